"""attention by Triton on a GPU, as `Op.choose` picks it: against float64, against eager, in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops import ATTENTION
from qwenopt.testing.cases import Case, cases, left_padding, qkv
from qwenopt.testing.tolerance import assert_as_accurate

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)


def build(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    causal: bool = False,
) -> tuple[Any, ...]:
    """Arguments for sizes (B, H, G, S, L, D)."""
    return (*(t.to(dtype) for t in qkv(*sizes)), mask, positions, causal, sizes[-1] ** -0.5)


def on_gpu(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def chosen(args: tuple[Any, ...]) -> Any:
    choice = ATTENTION.choose(args)
    assert choice.provider is not None, choice.reason
    assert choice.provider.name == "triton"
    return choice.provider.overload


def check(args: tuple[Any, ...]) -> None:
    args = on_gpu(args)
    found = chosen(args)(*args)
    assert_as_accurate(found.cpu(), ATTENTION.reference(*args).cpu(), ATTENTION.reference(*in_float64(args)).cpu())
    assert torch.equal(found, chosen(args)(*args)), "the same arguments give the same bits"


@DTYPES
@pytest.mark.parametrize("case", cases("attention"), ids=str)
def test_cases(case: Case, dtype: torch.dtype) -> None:
    check(case.build(dtype))


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 8), (32, 8), (40, 8), (64, 8), (32, 4), (64, 4)])
@pytest.mark.parametrize(("batch", "length"), [(1, 8000), (5, 1300)])
def test_decode(batch: int, length: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    check(build((batch, heads, kv_heads, 1, length, 128), dtype, positions=torch.tensor([length - 100])))


@DTYPES
@pytest.mark.parametrize("where", ["causal", "positions", "mask"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_prefill(dim: int, where: str, dtype: torch.dtype) -> None:
    sizes = (2, 16, 8, 900, 900, dim)
    mask = left_padding(2, 900, 900) if where == "mask" else None
    check(build(sizes, dtype, mask, torch.arange(900) if where == "positions" else None, where == "causal"))


@pytest.mark.parametrize("seq", [1, 600])
def test_a_cuda_graph_serves_other_positions(seq: int) -> None:
    args = on_gpu(build((2, 16, 8, seq, 2000, 128), BF16, positions=torch.arange(seq)))
    call = chosen(args)
    call(*args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*args)
    args[4].add_(1300)
    args[0].normal_()
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, call(*args))
