"""What a thing is, as a digest of what it holds: two things of one identity compute the same, whatever their names.

A thing says it itself in an attribute `identity`, None = it cannot be told (it is *anonymous*). Tensors, arrays,
numbers, texts, places and collections of these are digested; of a function its code and the functions that it calls. A
lambda, a closure, a partial, or a function that reads a global which is none of these is anonymous: what it computes
may differ from one process, or one line, to the next. Identities are computed at use, never kept: what is edited in
place is another thing.
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

OURS = __name__.split(".")[0]


class _Anonymous(Exception):
    """There is something in it that can't be digested."""


def identity_of(*things: Any) -> str | None:
    """A digest of what some things hold, 16 hexadecimal digits; None where something in them is anonymous.

    Example:
        >>> identity_of(torch.ones(2), "a") == identity_of(torch.ones(2), "a")
        True
        >>> identity_of(torch.ones(2)) == identity_of(torch.zeros(2))
        False
        >>> identity_of(lambda u, readout: u) is None
        True
    """
    return _digest(part for thing in things for part in _parts(thing, ()))


def identity_of_function(function: Callable[..., Any], holds: Any = None) -> str | None:
    """A digest of a function and of what it holds; None where something in them is anonymous.

    `holds` is what a lambda, a closure or a partial holds. Without it such a function is anonymous.

    Example:
        >>> times = lambda x: factor * x
        >>> identity_of_function(times) is None
        True
        >>> identity_of_function(times, holds=2) == identity_of_function(times, holds=3)
        False
    """
    if holds is None:
        return identity_of(function)
    return _digest(part for parts in (_held(function), _parts(holds, ())) for part in parts)


def _digest(parts: Iterator[bytes]) -> str | None:
    hasher = hashlib.sha256()
    try:
        for part in parts:
            hasher.update(part)
            hasher.update(b"\0")
    except _Anonymous:
        return None
    return hasher.hexdigest()[:16]


def _held(function: Callable[..., Any]) -> Iterator[bytes]:
    """The bytes of a function's code, where what it holds is said elsewhere."""
    if isinstance(function, partial):
        yield from _held(function.func)
    elif isinstance(function, types.FunctionType):
        yield from _named(function, ())
    elif isinstance(function, types.MethodType):
        yield from _held(function.__func__)
    elif isinstance(own := type(function).__call__, types.FunctionType):
        yield type(function).__qualname__.encode()
        yield from _held(own)
    else:
        yield from _parts(function, ())


def _parts(thing: Any, seen: tuple[Any, ...]) -> Iterator[bytes]:
    """The bytes that a thing comes down to; `seen` are the functions that it is read within."""
    said = getattr(thing, "identity", thing)  # of numpy that is a function, and nothing that it says of itself
    if said is None and thing is not None:
        raise _Anonymous
    if isinstance(said, str) and said is not thing:
        yield said.encode()
    elif isinstance(thing, Tensor):
        yield f"{thing.dtype}{tuple(thing.shape)}".encode()
        yield thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(thing, np.ndarray | np.generic) and not thing.dtype.hasobject:
        yield f"{thing.dtype}{thing.shape}".encode()
        yield thing.tobytes()
    elif thing is None or isinstance(thing, str | bytes | int | float | complex | range | slice | torch.dtype):
        yield f"{type(thing).__name__} {thing!r}".encode()
    elif isinstance(thing, Mapping):
        yield f"mapping of {len(thing)}".encode()
        for key, value in thing.items():
            yield from _parts(key, seen)
            yield from _parts(value, seen)
    elif isinstance(thing, tuple | list | set | frozenset):
        yield f"{type(thing).__name__} of {len(thing)}".encode()
        for part in sorted(thing, key=repr) if isinstance(thing, set | frozenset) else thing:
            yield from _parts(part, seen)
    elif is_dataclass(thing) and not isinstance(thing, type):
        yield type(thing).__qualname__.encode()
        for field in fields(thing):
            yield from _parts(getattr(thing, field.name), seen)
    elif isinstance(thing, types.FunctionType):
        yield from _of_function(thing, seen)
    elif isinstance(thing, types.BuiltinFunctionType | types.ModuleType | type) and not _changes(thing):
        yield f"{getattr(thing, '__module__', '')}.{thing.__name__}".encode()
    else:
        raise _Anonymous


def _of_function(function: types.FunctionType, seen: tuple[Any, ...]) -> Iterator[bytes]:
    """A library's function by its name, one of a user's by its code and what that calls too."""
    if function.__closure__ or function.__code__.co_name == "<lambda>":
        raise _Anonymous
    yield from _named(function, seen)


def _named(function: types.FunctionType, seen: tuple[Any, ...]) -> Iterator[bytes]:
    yield f"{function.__module__}.{function.__qualname__}".encode()
    if function in seen or not _changes(function):
        return
    yield from _parts((function.__defaults__, function.__kwdefaults__), seen)
    yield from _of_code(function.__code__, function.__globals__, (*seen, function))


def _of_code(code: types.CodeType, names: Mapping[str, Any], seen: tuple[Any, ...]) -> Iterator[bytes]:
    yield code.co_code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _of_code(constant, names, seen)
        else:
            yield from _parts(constant, seen)
    for name in code.co_names:
        yield name.encode()
        if name in names:
            yield from _parts(names[name], seen)


def _changes(thing: Any) -> bool:
    """Whether the code of a function, class or module may be edited between two runs: a script's or a notebook's may,
    not an installed package's, which goes by its version."""
    name = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None) or "builtins"
    package = name.partition(".")[0]
    if package == OURS or (package in sys.stdlib_module_names and package != "__main__"):
        return False
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file


def adopt(value: object, function: object) -> None:
    """Gives a frozen value that stands for a function the function's docstring, module and signature."""
    for name in ("__doc__", "__module__", "__qualname__"):
        object.__setattr__(value, name, getattr(function, name, None))
    object.__setattr__(value, "__wrapped__", function)
