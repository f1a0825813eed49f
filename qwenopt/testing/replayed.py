"""CUDA graphs without a GPU: a stand-in that obeys their rules, so that keys, copies and results are proven anywhere.

What is captured has not run. A replay runs the call again on the very tensors it was captured with, whatever else was
given since; its results come into the tensors that the capture returned; and since all graphs share one pool, a replay
destroys the results of every other graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwenopt.graphs import raise_graph
from qwenopt.lowering import cuda_graph, direct
from qwenopt.lowering.cuda_graph_inputs import Inputs
from qwenopt.report import Captures, GraphReport


class _Undone(TorchDispatchMode):
    """Undoes, at its end, what was written to tensors that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = kwargs.get(argument.name, args[i] if i < len(args) else None)
                for t in value if isinstance(value, (list, tuple)) else [value]:
                    self._save(t)
        return func(*args, **kwargs)

    def _save(self, t: Tensor | None) -> None:
        if t is not None and (begin := t.untyped_storage().data_ptr()) not in self._saved:
            whole = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
            self._saved[begin] = (whole, whole.clone())

    def undo(self) -> None:
        for whole, before in self._saved.values():
            whole.copy_(before)


class Replayed:
    """A captured call."""

    def __init__(self, pool: ReplayedGraphs, call: Callable[[], Any], outputs: Sequence[Any], inputs: set[int]) -> None:
        self._pool, self._call, self.outputs, self._inputs = pool, call, outputs, inputs

    def destroy(self) -> None:
        """Overwrite the results, as another graph of the pool does."""
        for t in self._own():
            t.fill_(float("nan") if t.is_floating_point() else 77)

    def _own(self) -> list[Tensor]:
        tensors = [t for t in self.outputs if isinstance(t, Tensor)]
        return [t for t in tensors if t.untyped_storage().data_ptr() not in self._inputs]

    def replay(self) -> None:
        """Run the call again."""
        assert self._pool.in_turn, "a replay outside of a turn"
        for other in self._pool.recordings:
            other.destroy()
        own = {id(t) for t in self._own()}
        for to, result in zip(self.outputs, self._call() or (), strict=True):
            if isinstance(to, Tensor) and id(to) in own:
                to.copy_(result)


class ReplayedGraphs:
    """Stands in for the CUDA graphs of a device; `fails` is raised by the next capture."""

    def __init__(self) -> None:
        self.recordings: list[Replayed] = []
        self.in_turn = False
        self.fails: Exception | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One at a time, which one thread is anyhow."""
        assert not self.in_turn
        self.in_turn = True
        try:
            yield
        finally:
            self.in_turn = False

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Run the call."""
        assert self.in_turn
        return call()

    def capture(self, call: Callable[[], Any]) -> Replayed:
        """Find out what the call returns, and undo what it wrote."""
        assert self.in_turn
        undone = _Undone()
        with undone:
            outputs = call() or ()
            if self.fails is not None:
                undone.undo()
                raise self.fails
        undone.undo()
        given = {t.untyped_storage().data_ptr() for t in _closure(call) if isinstance(t, Tensor)}
        self.recordings.append(Replayed(self, call, outputs, given))
        self.recordings[-1].destroy()
        return self.recordings[-1]


def _closure(call: Callable[[], Any]) -> list[Any]:
    """The arguments that a call will be made with."""
    cells = [cell.cell_contents for cell in getattr(call, "__closure__", None) or ()]
    return [value for cell in cells if isinstance(cell, list) for value in cell]


class CapturingBackend:
    """Compiles as this backend does for a GPU under mode="reduce-overhead": on the references, with the stand-in."""

    def __init__(self) -> None:
        self.graphs = ReplayedGraphs()
        self.captured: list[cuda_graph.Captured] = []
        self.refused: list[str] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        ctx = raise_graph(gm)
        reason, places = cuda_graph.why_not(gm, ctx.raised), Inputs.of(gm, inputs, torch.device("cpu"))
        function = direct.lower(gm, ctx.raised, GraphReport(0), torch.device("cuda:0"))
        # On a CPU all nodes are computed on the CPU; other reasons hold here too.
        if reason is not None and "on the CPU" not in reason:
            self.refused.append(reason)
            return function
        self.captured.append(cuda_graph.Captured(function, places, self.graphs, Captures()))
        return self.captured[-1]
