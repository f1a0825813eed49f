"""one FX node  ->  steps of a plan, or a view: what the nodes between the raised ops become"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from qwenopt.ops.steps import Address, Array, NotPlanned, Size, Steps

# Methods and functions that may return a view of their first argument; whether one did is seen on a meta tensor.
_VIEWS = frozenset(
    {"view", "reshape", "transpose", "permute", "contiguous", "unsqueeze", "squeeze", "flatten", "unflatten", "getitem"}
)

SMALL_BYTES = 64 << 10  # what one thread copies while the others wait


@dataclass(frozen=True)
class Count:
    """`torch.arange(length)`: not in memory until it is added to something."""

    length: int


@dataclass(frozen=True)
class Nothing:
    """`torch.tensor([])`: what a growing cache holds at first."""


def record(steps: Steps, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record what `node` does to `args` (arrays, tuples of them, numbers); raises NotPlanned for an unknown one."""
    name = getattr(node.target, "__name__", node.target)
    if name == "getitem" and isinstance(args[0], tuple):
        return operator.getitem(*args)
    if name == "getitem" and isinstance(args[0], Array) and (index := _row_index(args[0], args[1])) is not None:
        return _take_rows(steps, args[0], index)
    if name in _VIEWS and isinstance(args[0], Array):
        if name == "getitem" and isinstance(args[1], slice) and isinstance(args[0].shape[0], Size):
            return _part(*args)
        return _view(node, args, kwargs)
    handler = _HANDLERS.get(str(name))
    if handler is None:
        raise NotPlanned(f"no step for {name}")
    try:
        bound = inspect.signature(handler).bind(steps, *args, **kwargs)
    except TypeError as error:
        raise NotPlanned(f"{name}: {error}") from error
    return handler(*bound.args, **bound.kwargs)


def _view(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Array:
    x: Array = args[0]
    if any(isinstance(value, Array) for value in tree_leaves((args[1:], kwargs))):
        raise NotPlanned(f"{node.target} by the values of a tensor")
    if not all(isinstance(stride, int) for stride in x.strides):
        raise NotPlanned("a view of a tensor whose strides are only known at run time")
    strides = tuple(stride for stride in x.strides if isinstance(stride, int))
    meta = torch.empty_strided(x.static_shape(), strides, dtype=x.dtype, device="meta")
    call: Callable[..., Any] = getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target  # type: ignore[arg-type,assignment]
    out = call(meta, *args[1:], **kwargs)
    if out.untyped_storage()._cdata != meta.untyped_storage()._cdata or out.dtype != x.dtype:
        raise NotPlanned(f"{node.target} makes a copy")
    return Array(x.buffer, tuple(out.shape), tuple(out.stride()), x.dtype, x.offset + out.storage_offset())


def _part(x: Array, which: slice) -> Array:
    """`x[first:-behind]` of as many rows as there are at run time: the pages of one layer of a pool."""
    first, last = which.start or 0, which.stop or 0
    step = x.strides[0]
    if not (isinstance(first, int) and isinstance(last, int) and isinstance(step, int)) or which.step is not None:
        raise NotPlanned("a part whose ends are only known at run time")
    if first < 0 or last > 0 or (which.stop is not None and last == 0):
        raise NotPlanned(f"x[{which.start}:{which.stop}] of an unknown number of rows")
    return Array(x.buffer, (x.shape[0] + (last - first), *x.shape[1:]), x.strides, x.dtype, x.offset + first * step)


def _row_index(x: Array, index: Any) -> Array | None:
    """The indices of `x[indices]` of a matrix, or of `x[:, indices, :]` of one matrix; None for anything else."""
    if x.dim() == 3 and isinstance(index, tuple) and len(index) == 3 and x.shape[0] == 1:
        full = slice(None)
        index = index[1] if (index[0], index[2]) == (full, full) else None
    elif x.dim() != 2:
        return None
    ok = isinstance(index, Array) and index.dim() == 1 and index.dtype == torch.int64 and index.is_contiguous()
    return index if ok else None


def _take_rows(steps: Steps, x: Array, index: Array) -> Array:
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise NotPlanned("rows of x that are not whole")
    size, cols = x.dtype.itemsize, x.shape[-1]
    out = steps.empty((*x.shape[:-2], index.shape[0], cols), x.dtype)
    operands = (out.data_ptr(), x.data_ptr(), index.data_ptr(), index.shape[0], x.shape[-2], cols * size, cols * size)
    steps.add("take_rows", (*operands, x.stride(-2) * size), (x, index), (out,))
    return out


def _arange(steps: Steps, length: Any, *, device: Any = None) -> Count:
    if not isinstance(length, int) or torch.device(device or "cpu").type != "cpu":
        raise NotPlanned("an arange of another length or device")
    return Count(length)


def _add(steps: Steps, a: Any, b: Any) -> Array:
    if isinstance(b, Count):
        a, b = b, a
    if not (isinstance(a, Count) and isinstance(b, Array) and b.dtype == torch.int64 and b.numel() == 1):
        raise NotPlanned("a sum that is not arange + one position")
    out = steps.empty((a.length,), torch.int64)
    steps.add("count_from", (out.data_ptr(), b.data_ptr(), a.length), (b,), (out,), serial=True)
    return out


def _advance(steps: Steps, x: Any, value: Any) -> Array:
    if not (isinstance(x, Array) and isinstance(value, int) and x.dtype == torch.int64 and x.is_contiguous()):
        raise NotPlanned("add_ to something else than a counter")
    steps.add("advance", (x.data_ptr(), x.numel(), value), (x,), (x,), serial=True)
    return x


def _where(steps: Steps, which: Any, a: Any, b: Any) -> Array:
    arrays = [x for x in (a, b) if isinstance(x, Array)]
    known = all(isinstance(x, int | Array) for x in (a, b)) and isinstance(which, Array) and which.dtype == torch.bool
    fits = known and all(x.dtype == torch.int64 and x.shape == which.shape for x in arrays)
    if not (fits and arrays and all(x.is_contiguous() for x in (which, *arrays))):
        raise NotPlanned("a where of anything but ids")
    out = steps.empty(which.static_shape(), torch.int64)
    addresses = (x.data_ptr() if isinstance(x, Array) else 0 for x in (a, b))
    numbers = (x if isinstance(x, int) else 0 for x in (a, b))
    operands = (which.data_ptr(), *addresses, *numbers, out.data_ptr(), which.numel())
    steps.add("choose", operands, (which, *arrays), (out,), serial=True)
    return out


def _copy(steps: Steps, x: Any, source: Any) -> Array:
    same = isinstance(x, Array) and isinstance(source, Array) and (x.dtype, x.shape) == (source.dtype, source.shape)
    if not (same and x.dim() in (1, 2) and x.stride(-1) == source.stride(-1) == 1):
        raise NotPlanned("copy_ to another dtype, shape or layout")
    if x.numel() * x.dtype.itemsize > SMALL_BYTES:
        raise NotPlanned("a large copy_")
    shape, size = x.static_shape(), x.dtype.itemsize
    rows = shape[0] if x.dim() == 2 else 1
    strides = tuple(t.stride(0) * size if x.dim() == 2 else 0 for t in (x, source))
    operands = (x.data_ptr(), source.data_ptr(), rows, shape[-1] * size, *strides)
    steps.add("copy_rows", operands, (source,), (x,), serial=True)
    return x  # type: ignore[no-any-return]


def _index_copy(steps: Steps, x: Any, dim: Any, index: Any, source: Any) -> Array:
    ok = isinstance(x, Array) and isinstance(index, Array) and isinstance(source, Array)
    if not (ok and x.dim() == 4 and dim in (2, -2) and index.dtype == torch.int64 and index.is_contiguous()):
        raise NotPlanned("index_copy_ along another dimension than that of the keys")
    _move_rows(steps, x, source, positions=index)
    return x  # type: ignore[no-any-return]


def _empty(steps: Steps, data: Any, *, dtype: Any = None, device: Any = None) -> Nothing:
    if data != [] or torch.device(device or "cpu").type != "cpu":
        raise NotPlanned("a tensor with values, or on another device")
    return Nothing()


def _cat(steps: Steps, tensors: Any, dim: Any = 0) -> Array:
    if len(tensors) == 2 and isinstance(tensors[0], Nothing) and isinstance(tensors[1], Array) and dim in (2, -2):
        out = steps.empty(tensors[1].shape, tensors[1].dtype)
        _move_rows(steps, out, tensors[1], first=0)
        return out
    ok = len(tensors) == 2 and all(isinstance(t, Array) and t.dim() == 4 for t in tensors) and dim in (2, -2)
    if not (ok and tensors[0].dtype == tensors[1].dtype):
        raise NotPlanned("cat of other tensors than cached and new keys")
    past, new = tensors
    out = steps.empty((*past.shape[:2], past.shape[2] + new.shape[2], past.shape[3]), past.dtype)
    _move_rows(steps, out, past, first=0)
    _move_rows(steps, out, new, first=past.shape[2])
    return out


def _move_rows(steps: Steps, to: Array, source: Array, *, positions: Array | None = None, first: Any = 0) -> None:
    batch, groups, seq, dim = source.shape
    same = to.shape[:2] == source.shape[:2] and to.shape[3] == dim and to.dtype == source.dtype
    if not same or (dim != 1 and (to.stride(3) != 1 or source.stride(3) != 1)):
        raise NotPlanned("rows of another shape, dtype or layout than the cache's")
    size = to.dtype.itemsize
    addresses: tuple[Address | int, ...] = (to.data_ptr(), source.data_ptr(), positions.data_ptr() if positions else 0)
    strides = tuple(stride * size for stride in (*to.strides[:3], *source.strides[:3]))
    operands = (*addresses, first, batch, groups, seq, to.shape[2], dim * size, *strides)
    steps.add("move_rows", operands, (source, positions), (to,))


_HANDLERS: dict[str, Callable[..., Any]] = {
    "tensor": _empty,
    "arange": _arange,
    "add": _add,
    "add_": _advance,
    "where": _where,
    "copy_": _copy,
    "index_copy_": _index_copy,
    "cat": _cat,
}
