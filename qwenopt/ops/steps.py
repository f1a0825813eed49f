"""Recording native calls instead of making them: what an op's provider becomes in a plan.

A plan (`qwenopt._C.Plan`) runs many native calls as one. The same code that computes the numbers of a native call from
tensors computes them from `Array`s: an array has a tensor's shape, strides and dtype, but its address is that of a
buffer whose place is only known later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


class NotPlanned(Exception):
    """This operation cannot be a step of a plan; the message says why."""


@dataclass(frozen=True)
class Size:
    """A number known when the plan runs: `offset + scale * sizes[index]`."""

    index: int
    scale: int = 1
    offset: int = 0

    def __add__(self, other: int) -> Size:
        return Size(self.index, self.scale, self.offset + other)

    def __mul__(self, other: Any) -> Size:
        if not isinstance(other, int):
            raise NotPlanned("a product of two sizes that are only known at run time")
        return Size(self.index, self.scale * other, self.offset * other)

    __radd__, __rmul__ = __add__, __mul__


Number = int | Size


@dataclass(eq=False)
class Buffer:
    """A piece of memory: `nbytes` of a plan's arena, or that of a tensor given or made at run time (None)."""

    nbytes: int | None = None


@dataclass(frozen=True)
class Address:
    """A place inside a buffer."""

    buffer: Buffer
    offset: int


def contiguous_strides(shape: Sequence[Number]) -> tuple[Number, ...]:
    """Strides of a contiguous tensor of that shape, as torch has them."""
    strides: list[Number] = []
    step: Number = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step = step * (max(size, 1) if isinstance(size, int) else size)
    return tuple(strides)


@dataclass(frozen=True, eq=False)
class Array:
    """A strided tensor over a buffer; the part of torch.Tensor's interface that the providers' numbers need."""

    buffer: Buffer
    shape: tuple[Number, ...]
    strides: tuple[Number, ...]
    dtype: torch.dtype
    offset: int = 0  # in elements

    def data_ptr(self) -> Address:
        return Address(self.buffer, self.offset * self.dtype.itemsize)

    def dim(self) -> int:
        return len(self.shape)

    def stride(self, dim: int | None = None) -> Any:
        return self.strides if dim is None else self.strides[dim]

    def numel(self) -> int:
        count = 1
        for size in self.static_shape():
            count *= size
        return count

    def static_shape(self) -> tuple[int, ...]:
        """The shape, where it does not depend on the run."""
        if not all(isinstance(size, int) for size in self.shape):
            raise NotPlanned(f"a shape that is only known at run time: {self.shape}")
        return self.shape  # type: ignore[return-value]

    def is_contiguous(self) -> bool:
        pairs = zip(self.shape, self.strides, contiguous_strides(self.shape), strict=True)
        return all(size == 1 or a == b for size, a, b in pairs)

    def transpose(self, a: int, b: int) -> Array:
        """The same memory with two dimensions exchanged."""
        shape, strides = list(self.shape), list(self.strides)
        shape[a], shape[b], strides[a], strides[b] = shape[b], shape[a], strides[b], strides[a]
        return Array(self.buffer, tuple(shape), tuple(strides), self.dtype, self.offset)

    def expand(self, shape: Sequence[Number]) -> Array:
        """Broadcast to `shape`: strides of 0 where the size is 1 here and another there."""
        pairs = zip(self.shape, shape, self.strides, strict=True)
        strides = tuple(0 if size == 1 and size != wanted else stride for size, wanted, stride in pairs)
        return Array(self.buffer, tuple(shape), strides, self.dtype, self.offset)


@dataclass(eq=False)
class Step:
    """One native call: its operands (numbers, sizes, addresses), and what it reads and writes.

    A serial step is run by the first thread alone: two of them need no barrier between them.
    """

    name: str
    operands: tuple[Any, ...]
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    serial: bool = False


@dataclass
class Steps:
    """The steps recorded so far, for a number of threads."""

    threads: int
    steps: list[Step] = field(default_factory=list)
    made: dict[Buffer, Array] = field(default_factory=dict)

    def empty(self, shape: Sequence[Number], dtype: torch.dtype) -> Array:
        """A contiguous array whose contents a step will write."""
        array = Array(Buffer(), tuple(shape), contiguous_strides(shape), dtype)
        if all(isinstance(size, int) for size in shape):
            array.buffer.nbytes = array.numel() * dtype.itemsize
        self.made[array.buffer] = array
        return array

    def scratch(self, nbytes: int) -> Array:
        """Memory for the inside of a step."""
        return self.empty((nbytes,), torch.uint8)

    def add(
        self,
        name: str,
        operands: Sequence[Any],
        reads: Sequence[Array | None],
        writes: Sequence[Array],
        *,
        serial: bool = False,
    ) -> None:
        """Record a call of the native function `name`; `operands` are its arguments before `threads`."""
        read = tuple(array.buffer for array in reads if array is not None)
        self.steps.append(Step(name, tuple(operands), read, tuple(array.buffer for array in writes), serial))


def need_contiguous(**arrays: Array) -> None:
    """Raise NotPlanned unless every array is contiguous: the provider would copy it."""
    for name, array in arrays.items():
        if not array.is_contiguous():
            raise NotPlanned(f"{name} is not contiguous")
