"""A lock for what one thread at a time may use."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import RLock
from typing import ParamSpec, TypeVar

P, R = ParamSpec("P"), TypeVar("R")


class Turn:
    """A lock that one thread at a time holds, as often as it likes; a copy of it is a lock of its own."""

    def __init__(self) -> None:
        self._lock = RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


def in_turn(method: Callable[P, R]) -> Callable[P, R]:
    """The method of a tower, run while no other thread runs the tower or has hooks on it."""

    @wraps(method)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        with args[0].turn:
            return method(*args, **kwargs)

    return waiting
