"""Progress of long work: a line per running loop, where someone is looking."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

from tqdm.std import tqdm

SOON = 1.0
"""Seconds of work before a bar is shown: what is done by then needs none."""


def progress_bar(total: int, unit: str, what: str = "", *, show: bool = True) -> tqdm[Any]:
    """A progress bar over `total` units, to be used with `with`; nested ones stand below each other and vanish.

    It is shown on a terminal and in a notebook, from the second second on; never with `show=False`, into a file or
    a pipe, or where the variable CI is set.

    Example:
        >>> with progress_bar(3, "row", show=False) as bar:
        ...     _ = bar.update(3)
        >>> bar.disable
        True
    """
    kind = _kind()
    return kind(total=total, unit=unit, desc=what or None, leave=False, delay=SOON, disable=not (show and watched()))


def watched() -> bool:
    """Whether anyone can see a bar: a terminal, or a notebook; not in CI.

    Example:
        >>> isinstance(watched(), bool)
        True
    """
    return not os.environ.get("CI") and (in_notebook() or sys.stderr.isatty())


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel.

    Example:
        >>> in_notebook()
        False
    """
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"


def _kind() -> type[tqdm[Any]]:
    """A widget in a notebook that has widgets, else a line of text."""
    if in_notebook() and find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm_notebook

        return tqdm_notebook
    return tqdm
