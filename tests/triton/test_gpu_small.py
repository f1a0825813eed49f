"""The small Triton kernels on a GPU, as `Op.choose` picks them: what the references give on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops import BUDGET_GUARD, BUDGET_STEP
from qwenopt.testing.budget_rows import random_rows

pytestmark = pytest.mark.gpu


def on_gpu(args: Any) -> list[Any]:
    return [a.cuda() if isinstance(a, Tensor) else a for a in args]


def chosen(op: Any, args: Any) -> Any:
    choice = op.choose(args)
    assert choice.provider is not None, choice.reason
    assert choice.provider.name == "triton"
    return choice.provider.overload


@pytest.mark.parametrize("seed", range(10))
def test_budget_step(seed: int) -> None:
    args = random_rows(seed)
    moved = on_gpu(args)
    out = chosen(BUDGET_STEP, moved)(*moved)
    assert torch.equal(out.cpu(), BUDGET_STEP.reference(*args))
    for found, wanted in zip(moved, args, strict=True):
        assert torch.equal(found.cpu(), wanted)


def test_budget_step_in_a_cuda_graph() -> None:
    """Each replay takes the state on from where it is, with no host in between."""
    args = random_rows(0)
    moved = on_gpu(args)
    call = chosen(BUDGET_STEP, moved)
    call(*on_gpu(args))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*moved)
    for seed in range(5):
        sampled, signals = random_rows(seed)[:2]
        moved[0].copy_(sampled)
        moved[1].copy_(signals)
        graph.replay()
        assert torch.equal(out.cpu(), BUDGET_STEP.reference(sampled, signals, *args[2:]))
    assert torch.equal(moved[2].cpu(), args[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_budget_guard(seed: int, dtype: torch.dtype) -> None:
    _, _, state, _, _, ids = random_rows(seed)
    logits = torch.randn(len(state), 60).to(dtype)
    moved = on_gpu((logits, state, ids))
    chosen(BUDGET_GUARD, (moved[0][:, :50], *moved[1:]))(moved[0][:, :50], *moved[1:])
    BUDGET_GUARD.reference(logits[:, :50], state, ids)
    assert torch.equal(moved[0].cpu(), logits)
