"""Which arguments the Triton providers of the heavy ops take, and the reason where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwenopt.lowering.providers import HEAVY_OPS
from qwenopt.ops import OPS
from qwenopt.testing.cases import CASES, Case, case

HEAVY = ("linear", "moe_experts", "attention")


def reason(op: str, args: Any) -> str | None:
    provider = next(p for p in OPS[op].providers if p.name == "triton")
    assert provider.device == "cuda"
    answer: str | None = provider.accepts(*args)
    return answer


def test_every_heavy_op_has_a_kernel() -> None:
    """One without would send the graph to Inductor."""
    assert all(any(p.name == "triton" for p in OPS[name].providers) for name in HEAVY_OPS)


@pytest.mark.parametrize("case", [c for c in CASES if c.op in HEAVY], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ordinary_arguments(case: Case, dtype: torch.dtype) -> None:
    assert reason(case.op, case.build(dtype)) is None


@pytest.mark.parametrize("op", HEAVY)
def test_double_is_refused(op: str) -> None:
    assert "torch.float64" in str(reason(op, CASES[[c.op for c in CASES].index(op)].build(torch.float64)))


@pytest.mark.parametrize(("op", "at"), [("linear", 1), ("moe_experts", 2), ("moe_experts", 4), ("attention", 2)])
def test_mixed_arguments_are_refused(op: str, at: int) -> None:
    args = list(CASES[[c.op for c in CASES].index(op)].build())
    fits = args[at]
    args[at] = fits.half()
    assert "mixed dtypes torch.float16, torch.float32" in str(reason(op, args))
    args[at] = fits.to("meta")
    assert "on several devices" in str(reason(op, args))


@pytest.mark.parametrize(("op", "at"), [("linear", 1), ("moe_experts", 3), ("moe_experts", 4), ("attention", 0)])
def test_columns_that_do_not_touch_are_refused(op: str, at: int) -> None:
    args = list(CASES[[c.op for c in CASES].index(op)].build())
    args[at] = args[at].mT.contiguous().mT
    assert "in its last dimension" in str(reason(op, args))


def test_ids_and_positions_are_int64() -> None:
    x, indices, *rest = case("moe_experts", "decode").build()
    assert "indices has dtype torch.int32" in str(reason("moe_experts", (x, indices.int(), *rest)))
    *first, positions, causal, scale = case("attention", "positions").build()
    assert "q_positions has dtype torch.int32" in str(reason("attention", (*first, positions.int(), causal, scale)))


def test_sizes_past_the_kernels_are_named() -> None:
    x, _, _, *experts = case("moe_experts", "decode").build()
    many = (x, torch.zeros(1, 17).long(), torch.zeros(1, 17), *experts)
    assert "17 experts for each token" in str(reason("moe_experts", many))
    q, k = torch.zeros(1, 34, 1, 288), torch.zeros(1, 2, 5, 288)
    assert "head_dim 288" in str(reason("attention", (q, k, k, None, None, False, 1.0)))
    q, k = q[..., :64], k[..., :64]
    assert "17 query heads for each key/value head" in str(reason("attention", (q, k, k, None, None, False, 1.0)))
