"""recorded steps  ->  a native plan and what it needs at each call: addresses, sizes, new tensors for its results"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from qwenopt import native
from qwenopt.lowering import plan_memory
from qwenopt.ops.steps import Address, Array, Buffer, NotPlanned, Number, Size

if TYPE_CHECKING:
    from qwenopt.lowering.plan_recording import Recording

_ARENA = 0  # slot of the arena's address among the values of a run; inputs, new tensors and sizes follow


@dataclass(frozen=True)
class _Result:
    """A result: a view of input `source`, or of new tensor `source` when `is_new`."""

    source: int
    is_new: bool
    array: Array


@dataclass
class NativePlan:
    """A plan of the native extension, the arena that it works in, and how to call it.

    A call may be made from any thread; calls of one plan exclude each other. The results are new tensors each time.
    """

    plan: Any
    steps: tuple[tuple[str, bool], ...]  # name, and whether a barrier follows
    arena: Tensor
    arena_address: int
    threads: int
    expected_strides: tuple[tuple[int, tuple[Number, ...]], ...]  # of inputs that Dynamo does not guard
    sizes: tuple[tuple[int, int], ...]  # input and dimension of every size known at run time
    new: tuple[Array, ...]
    results: tuple[_Result, ...]
    isa: int = -1  # the best; tests and benchmarks try others

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the tensors computed in this graph have the strides that the plan was made for."""
        sizes = self._sizes(inputs)
        return all(inputs[i].stride() == (_resolve(s, sizes) if sizes else s) for i, s in self.expected_strides)

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self._call(inputs, self.plan.run)[0]

    def profile(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], list[tuple[str, float]]]:
        """The same, and the name of each step with the seconds that the first thread spent in it."""
        return self._call(inputs, self.plan.profile)

    def _call(self, inputs: Sequence[Tensor], run: Callable[..., Any]) -> tuple[tuple[Tensor, ...], Any]:
        sizes = self._sizes(inputs)
        made = [torch.empty(_resolve(array.shape, sizes), dtype=array.dtype) for array in self.new]
        values = [self.arena_address]
        values += [t.data_ptr() for t in inputs]
        values += [t.data_ptr() for t in made]
        values += sizes
        returned = run(values, self.threads, self.isa)
        return tuple(self._result(r, inputs, made, sizes) for r in self.results), returned

    def _sizes(self, inputs: Sequence[Tensor]) -> list[int]:
        return [inputs[i].shape[dim] for i, dim in self.sizes]

    def _result(self, r: _Result, inputs: Sequence[Tensor], made: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        base = made[r.source] if r.is_new else inputs[r.source]
        if r.is_new and r.array is self.new[r.source]:
            return base
        shape, strides = _resolve(r.array.shape, sizes), _resolve(r.array.strides, sizes)
        return base.as_strided(shape, strides, base.storage_offset() + r.array.offset)


def _resolve(numbers: Sequence[Number], sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(n if isinstance(n, int) else n.offset + n.scale * sizes[n.index] for n in numbers)


def compile_plan(recording: Recording, placeholders: Sequence[Node], results: Sequence[Any]) -> NativePlan:
    """Lay out memory, find barriers, encode the operands. `placeholders` are the inputs in the order of a call."""
    arrays = [_need_array(value) for value in results]
    position = {node: i for i, node in enumerate(placeholders)}
    inputs = {recording.values[node].buffer: position[node] for node in recording.inputs}
    leaving = {array.buffer for array in arrays}
    new = [made for b, made in recording.steps.made.items() if b in leaving or b.nbytes is None]
    buffers = [array.buffer for array in new]
    steps = recording.steps.steps
    layout = plan_memory.lay_out(steps, {*inputs, *buffers})
    slots = {buffer: 1 + i for buffer, i in inputs.items()}
    slots |= {buffer: 1 + len(placeholders) + i for i, buffer in enumerate(buffers)}
    first_size = 1 + len(placeholders) + len(new)
    encoder = _Encoder(layout, slots, first_size)
    meet = plan_memory.barriers(steps, layout, _read_only(recording))
    encoded = [(s.name, [encoder.operand(v) for v in s.operands], m) for s, m in zip(steps, meet, strict=True)]
    num_values = first_size + len(recording.symbols.places)
    arena = torch.empty(layout.nbytes + plan_memory.ALIGNMENT, dtype=torch.uint8)
    return NativePlan(
        plan=native.C().Plan(encoded, num_values),
        steps=tuple((name, barrier) for name, _, barrier in encoded),
        arena=arena,
        arena_address=-(-arena.data_ptr() // plan_memory.ALIGNMENT) * plan_memory.ALIGNMENT,
        threads=recording.steps.threads,
        expected_strides=_expected_strides(recording, position),
        sizes=tuple((position[node], dim) for node, dim in recording.symbols.places),
        new=tuple(new),
        results=tuple(_result(array, inputs, buffers) for array in arrays),
    )


def _need_array(value: Any) -> Array:
    if not isinstance(value, Array):
        raise NotPlanned(f"a result of type {type(value).__name__}")
    return value


def _result(array: Array, inputs: dict[Buffer, int], new: Sequence[Buffer]) -> _Result:
    if array.buffer in inputs:
        return _Result(inputs[array.buffer], False, array)
    return _Result(new.index(array.buffer), True, array)


def _read_only(recording: Recording) -> set[Buffer]:
    """Inputs that no write of the plan can reach: parameters, which are written to by nobody in an inference graph."""
    return {
        recording.values[node].buffer for node in recording.inputs if isinstance(_example(node), torch.nn.Parameter)
    }


def _example(node: Node) -> Any:
    """What Dynamo traced this input with, or None: a later recording may find a growing cache's tensor gone by then."""
    try:
        return getattr(node.meta.get("grapharg"), "example", None)
    except AssertionError:  # torch's word for a tensor that was freed
        return None


def _expected_strides(recording: Recording, position: dict[Node, int]) -> tuple[tuple[int, tuple[Number, ...]], ...]:
    # An input of Dynamo's graph has a "grapharg", and is guarded.
    return tuple(
        (position[node], recording.values[node].strides) for node in recording.inputs if "grapharg" not in node.meta
    )


class _Encoder:
    """Operands as the native plan takes them: (slot of the value, scale, offset), slot -1 for a constant."""

    def __init__(self, layout: plan_memory.Layout, slots: dict[Buffer, int], first_size: int) -> None:
        self.layout, self.slots, self.first_size = layout, slots, first_size

    def operand(self, value: Any) -> tuple[int, int, int]:
        if isinstance(value, float):
            return -1, 0, struct.unpack("<q", struct.pack("<d", value))[0]
        if isinstance(value, Size):
            return self.first_size + value.index, value.scale, value.offset
        if isinstance(value, Address):
            if value.buffer in self.layout.offsets:
                return _ARENA, 1, self.layout.offsets[value.buffer] + value.offset
            return self.slots[value.buffer], 1, value.offset
        return -1, 0, int(value)
