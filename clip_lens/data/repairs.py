"""Which image an id may mean that a store doesn't have: offered, never taken unasked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath

from clip_lens.data.crops import cropped


def offered(names: Iterable[str], ids: Iterable[str]) -> dict[str, str]:
    """For each name that is no id, the one id of the same file name, if folders, letters' case, kind of slash and
    ending are let go.

    Of several, the one whose folders agree furthest, then the one of the same ending; nothing where two are left.

    Example:
        >>> offered(["C:\\\\pictures\\\\p04.jpg", "p05.jpg", "x.gif"], ["p04.gif", "a/p05.gif", "b/p05.gif"])
        {'C:\\\\pictures\\\\p04.jpg': 'p04.gif'}
    """
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    known = set(ids)
    for each in known:
        alike[_stem(each)].append(each)
    found = {}
    for name in dict.fromkeys(names):
        near = [] if name in known else sorted(alike.get(_stem(name), ()), key=lambda each: _agreement(name, each))
        if near and (len(near) == 1 or _agreement(name, near[-1]) > _agreement(name, near[-2])):
            found[name] = near[-1]
    return found


def _path(name: str) -> PurePosixPath:
    return PurePosixPath(cropped(name)[0].replace("\\", "/").lower())


def _stem(name: str) -> tuple[object, ...]:
    """What a name and the id that it may mean have in common: the file's name without its ending, and the crop."""
    return _path(name).stem, cropped(name)[1]


def _agreement(name: str, known: str) -> tuple[int, bool]:
    """How many folders from the file upwards agree, and whether the ending does."""
    one, two = _path(name), _path(known)
    folders = 0
    for mine, its in zip(reversed(one.parent.parts), reversed(two.parent.parts), strict=False):
        if mine != its:
            break
        folders += 1
    return folders, one.suffix == two.suffix
