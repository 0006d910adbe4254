"""A device that is not there: tensors that say they are elsewhere, compute on the CPU, and refuse to meet its tensors.

    with elsewhere() as fetched:
        encoder.to(ELSEWHERE)
        ...
    fetched  # how often the CPU had to wait for a number from there, by operation

What torch allows of a GPU is allowed: copies, scalars of the CPU (0-dim) in pointwise operations, its indices.
"""

from collections import Counter
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("meta")
"""Torch's device without data: its tensors have none, unless they are ours."""

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
SCALARS = {aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill.Tensor, aten.fill_.Tensor}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
FETCHES = {aten._local_scalar_dense.default, aten._to_copy.default, aten.nonzero.default, *INDEXED}


class Mixed(RuntimeError):
    """An operation on tensors of two devices."""


class There(torch.Tensor):
    """A tensor elsewhere. `here` holds its numbers."""

    @staticmethod
    def __new__(cls, here):
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        with torch.inference_mode(here.is_inference()):
            return torch.Tensor._make_wrapper_subclass(cls, here.shape, device=ELSEWHERE, **layout)

    def __init__(self, here):
        self.here = here

    def __repr__(self):
        return f"There({self.here})"

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.fetched = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # In inference mode operations come whole, `to` with its device in any argument.
        with self, torch._C.DisableTorchFunction():
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if fetches(func, args, kwargs):
            self.fetched[func] += 1
        return computed(func, args, kwargs)


class Literals(TorchFunctionMode):
    """Numbers of Python's become a tensor here that is sent there: torch leaves them out on a device without data."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
            return func(*args, **kwargs).to(device)
        if func is torch.Tensor.new_tensor:
            device = kwargs.pop("device", args[0].device)
            return torch.tensor(args[1], **{"dtype": args[0].dtype} | kwargs).to(device)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], as_tensors(args[1], args[0].device), *args[2:])
        return func(*args, **kwargs)


def as_tensors(index, device):
    """An index whose lists are tensors."""
    if isinstance(index, tuple):
        return tuple(as_tensors(part, device) for part in index)
    return torch.tensor(index).to(device) if isinstance(index, (list, range)) else index


@contextmanager
def elsewhere():
    """Within it, tensors that are moved to or made on `ELSEWHERE` are there."""
    with Literals(), Operations() as operations:
        yield operations.fetched


def computed(func, args, kwargs):
    """What the operation gives, where torch would put it."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    there = any(isinstance(tensor, There) for tensor in tensors)
    target = kwargs.get("device")
    assert all(isinstance(tensor, There) or tensor.device != ELSEWHERE for tensor in tensors), f"{func}: lost numbers"
    refuse_mixing(func, args, tensors)
    to_there = there if target is None else torch.device(target) == ELSEWHERE
    if to_there and kwargs.get("generator") is not None:
        raise Mixed(f"{func}: a generator of the CPU draws for a tensor elsewhere")
    here = {**kwargs, "device": torch.device("cpu")} if target is not None else kwargs
    found = func(*tree_map(fetched, args), **tree_map(fetched, here))
    if there and torch.Tag.inplace_view in func.tags:
        with torch._C._DisableTorchDispatch():  # the shape that the tensor elsewhere says it has
            func(*args, **kwargs)
    own = {id(tensor.here): tensor for tensor in tensors if isinstance(tensor, There)}  # given back by what is in place
    if not to_there or any(found is tensor for tensor in tensors):
        return found
    wrapped = lambda value: own[id(value)] if id(value) in own else There(value)
    return tree_map(lambda value: wrapped(value) if isinstance(value, torch.Tensor) else value, found)


def fetched(value):
    return value.here if isinstance(value, There) else value


def refuse_mixing(func, args, tensors):
    """As torch refuses it."""
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    here = [tensor for tensor in tensors if not isinstance(tensor, There)]
    if torch.Tag.pointwise in func.tags or func in SCALARS:
        here = [tensor for tensor in here if tensor.ndim]
    if func in INDEXED and isinstance(args[0], There):
        here = [tensor for tensor in args[2:3] if not isinstance(tensor, There) and tensor.ndim]
    if there and here and func not in COPIES:
        shapes = [", ".join(str(tuple(tensor.shape)) for tensor in some) for some in (there, here)]
        raise Mixed(f"{func} of tensors elsewhere, {shapes[0]}, and on the CPU, {shapes[1]}")


def fetches(func, args, kwargs):
    """Whether a GPU would have to finish first: a number is asked for, or a shape depends on numbers."""
    if func not in FETCHES or not args or not isinstance(args[0], There):
        return False
    if func is aten._to_copy.default:
        return kwargs.get("device") is not None and torch.device(kwargs["device"]) != ELSEWHERE
    if func in INDEXED:
        return any(
            index is not None and (not isinstance(index, There) or index.dtype is torch.bool) for index in args[1]
        )
    return True
