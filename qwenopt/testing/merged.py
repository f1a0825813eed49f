"""What graphs on a GPU are merged to, seen on one that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import qwenopt
from qwenopt import backend, graphs, report
from qwenopt.lowering import providers
from qwenopt.ops import OPS, Provider
from qwenopt.testing.fake_cuda import FakeGpu


def captured(gpu: FakeGpu, call: Callable[..., Any], *args: Any) -> tuple[Any, Callable[[], Any]]:
    """What the backend makes of a call on the GPU, and a function that runs it."""
    report.clear()
    runs: list[Callable[[], Any]] = []

    def made(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        lowered = backend.compile_graph(gm, inputs)

        def run(*given: Any) -> Any:
            runs.append(lambda: lowered(*given))
            return lowered(*given)

        return run

    torch.compiler.reset()
    with gpu.mode:
        torch.compile(call, backend=made, fullgraph=True)(*args)
    (graph,) = qwenopt.last_report().graphs
    assert graph.lowering == "direct", graph.reason
    return graph, runs[0]


def raised_and_merged(gpu: FakeGpu, call: Callable[..., Any], *args: Tensor) -> dict[str, int]:
    """Of a function that is no model: what is raised, by op, after merging."""
    found: list[list[str]] = []

    def made(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        ctx = graphs.raise_graph(gm)
        providers.choose(ctx.raised)
        found.append([r.op.name for r in graphs.merge_graph(gm, ctx.raised)])
        return gm.forward

    torch.compiler.reset()
    with gpu.mode:
        torch.compile(call, backend=made, fullgraph=True)(*args)
    (names,) = found
    return {name: names.count(name) for name in dict.fromkeys(names)}


def tensors(gpu: FakeGpu, *shapes: tuple[int, ...]) -> list[Tensor]:
    """bfloat16 tensors on the GPU."""
    return [gpu.tensor(torch.empty(shape, dtype=torch.bfloat16)) for shape in shapes]


@contextmanager
def merging_on_the_cpu() -> Iterator[None]:
    """There, too, everything that can be is merged; references do the work of the kernels that a GPU has."""
    ops = [OPS[name] for name, _ in graphs.MERGES if name]
    ops.append(OPS["linear"])  # without the native extension nothing else has a kernel, and nothing would be merged
    with ExitStack() as stack:
        for op in ops:
            stand_in = Provider("stand-in", "cpu", op.reference, _always, _always, op.default)
            stack.enter_context(mock.patch.object(op, "providers", [*op.providers, stand_in]))
        yield


def _always(*args: Any) -> None:
    """No reason not to."""


class Rope(nn.Module):
    """Norm, rotation and append of a layer, in the spelling of transformers. `after` says what follows."""

    def __init__(self, after: Callable[..., Any]) -> None:
        super().__init__()
        self.after = after

    def forward(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor) -> Any:
        def norm(x: Tensor) -> Tensor:
            wide = x.to(torch.float32)
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            return (weight * wide.to(x.dtype)).transpose(1, 2)

        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

        def turn(x: Tensor) -> Tensor:
            half = x.shape[-1] // 2
            return (x * cos) + (torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin)

        return self.after(turn(norm(q)), turn(norm(k)), v, *rest)
