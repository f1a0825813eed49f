"""linear and moe_experts by Triton on a GPU, as `Op.choose` picks them: against float64, eager, in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops import LINEAR
from qwenopt.testing.cases import Case, cases
from qwenopt.testing.tolerance import assert_as_accurate

pytestmark = pytest.mark.gpu

BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [FP32, HALF, BF16], ids=str)


def on_gpu(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def check(op: Any, args: tuple[Any, ...]) -> Tensor:
    """What the Triton provider gives, no further from float64 than eager, the same bits each time."""
    args = on_gpu(args)
    choice = op.choose(args)
    assert choice.provider is not None, choice.reason
    assert choice.provider.name == "triton"
    found = choice.provider.overload(*args)
    assert_as_accurate(found.cpu(), op.reference(*args).cpu(), op.reference(*in_float64(args)).cpu())
    assert torch.equal(found, choice.provider.overload(*args)), "the same arguments give the same bits"
    return found


def replays(op: Any, args: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    """A CUDA graph of a call computes what a call computes, on other numbers."""
    args = on_gpu(args)
    call = op.choose(args).provider.overload
    call(*args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*args)
    for mine, new in zip(args, other, strict=True):
        if isinstance(mine, Tensor):
            mine.copy_(new)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, call(*args))


def rows_and_weight(rows: int, n: int, k: int, dtype: torch.dtype, bias: bool = False) -> tuple[Any, ...]:
    x, weight = torch.randn(rows, k), torch.randn(n, k) * k**-0.5
    return tuple(None if t is None else t.to(dtype) for t in (x, weight, torch.randn(n) if bias else None))


@DTYPES
@pytest.mark.parametrize("case", cases("linear"), ids=str)
def test_linear_cases(case: Case, dtype: torch.dtype) -> None:
    check(LINEAR, case.build(dtype))


@DTYPES
@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (4096, 4096), (1024, 3072), (151936, 1024), (2560, 9728)])
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17])
def test_linear(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    check(LINEAR, rows_and_weight(rows, n, k, dtype, bias=k == 3072))


@pytest.mark.parametrize("rows", [1, 4])
def test_linear_in_a_cuda_graph(rows: int) -> None:
    replays(LINEAR, rows_and_weight(rows, 1024, 1024, BF16), rows_and_weight(rows, 1024, 1024, BF16))
