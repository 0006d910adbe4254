"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and vanishes when it does not.

    Of several threads or processes that write to one path, each writes a file of its own, and the last one stays.

    Example:
        >>> path = getfixture("tmp_path") / "a.txt"
        >>> with written_whole(path) as temporary:
        ...     _ = temporary.write_text("all of it")
        >>> path.read_text()
        'all of it'
    """
    target = Path(path)
    # Beside the target, since a rename is atomic only within one file system.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # a library may have put a file of its own there, readable by its owner only
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def in_folder(folder: Path, write: Callable[[], object]) -> None:
    """Writes into a folder that is made for it, and again if another run, that is done with it, removes it meanwhile.

    Example:
        >>> folder = getfixture("tmp_path") / "parts"
        >>> in_folder(folder, lambda: (folder / "a.txt").touch())
        >>> [path.name for path in folder.iterdir()]
        ['a.txt']
    """
    for _ in range(9):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write()
            return
        except FileNotFoundError:
            continue
    folder.mkdir(parents=True, exist_ok=True)
    write()
