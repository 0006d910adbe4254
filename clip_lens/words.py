"""What messages say: the first few of many, and what a misspelt name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def some(values: Iterable[object], most: int = 5, *, quote: bool = False) -> str:
    """The first few values, and how many more there are.

    Example:
        >>> some(["a", "b", "c"], 2), some(["a", 3], quote=True)
        ('a, b and 1 more', "'a', 3")
    """
    # A number of numpy's or torch's is written as the plain one.
    every = [value.item() if hasattr(value, "item") else value for value in values]
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(repr(value) if quote else str(value) for value in every[:most]) + rest


def close(name: str, names: Iterable[object]) -> str:
    """What a name may have meant, or what there is, as the end of a message.

    Example:
        >>> close("caption", ["captain", "foil"]), close("x", ["caption", "foil"])
        ("; did you mean 'captain'?", "; it has 'caption', 'foil'")
    """
    every = [str(each) for each in names]
    found = difflib.get_close_matches(name, every, n=1)
    return f"; did you mean {found[0]!r}?" if found else f"; it has {some(every, 20, quote=True)}"
