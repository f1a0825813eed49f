"""Which arguments the Triton providers of the small ops take, and the reason where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops import OPS
from qwenopt.testing.budget_rows import random_rows
from qwenopt.testing.cases import CASES, Case, case

SMALL = ("rms_norm", "add_rms_norm", "silu_mul", "qk_norm_rope", "moe_route")


def reason(op: str, args: Any) -> str | None:
    provider = next(p for p in OPS[op].providers if p.name == "triton")
    assert provider.device == "cuda"
    answer: str | None = provider.accepts(*args)
    return answer


@pytest.mark.parametrize("case", [c for c in CASES if c.op in SMALL], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ordinary_arguments(case: Case, dtype: torch.dtype) -> None:
    assert reason(case.op, case.build(dtype)) is None


@pytest.mark.parametrize("op", SMALL)
def test_double_is_refused(op: str) -> None:
    assert "torch.float64" in str(reason(op, case(op, "prefill").build(torch.float64)))


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "silu_mul", "qk_norm_rope"])
def test_mixed_arguments_are_refused(op: str) -> None:
    first, second, *rest = case(op, "prefill").build()
    assert "mixed dtypes" in str(reason(op, (first, second.half(), *rest)))
    assert "on several devices" in str(reason(op, (first, second.to("meta"), *rest)))


def columns(x: Tensor) -> Tensor:
    return x.transpose(-2, -1).contiguous().transpose(-2, -1)


@pytest.mark.parametrize("op", SMALL)
def test_columns_that_do_not_touch_are_refused(op: str) -> None:
    first, *rest = case(op, "prefill").build()
    assert "stride" in str(reason(op, (columns(first), *rest)))


def test_rows_are_evenly_spaced() -> None:
    x = torch.zeros(4, 6, 8)
    for fits in (x, x[:, :1], x[..., :5], x[:1, :3], x[0, 0], x[:0, :3, ::2], x[:1].expand(4, 6, 8)[:, :1], x[..., :1]):
        assert reason("silu_mul", (fits, fits)) is None, fits.stride()
    for uneven in (x[:, :3], x[..., ::2], x.transpose(0, 1), torch.zeros(())):
        assert "no evenly spaced rows" in str(reason("silu_mul", (uneven, uneven)))


def test_sizes_past_the_kernels_are_named() -> None:
    big = torch.zeros(1, 16385)
    assert "rows of 16385 (the kernel has up to 16384)" in str(reason("rms_norm", (big, big[0], 1e-6)))
    assert "1025 experts" in str(reason("moe_route", (torch.zeros(1, 1025), 2, True)))
    x, weight, table = torch.zeros(1, 1, 2, 258), torch.zeros(258), torch.zeros(1, 1, 258)
    assert "head_dim 258" in str(reason("qk_norm_rope", (x, x, weight, weight, table, table, 1e-6)))


def test_budget_ops() -> None:
    args = random_rows(0)
    logits = torch.zeros(64, 50)
    assert reason("budget_step", args) is None
    assert reason("budget_guard", (logits[:, :40], args[2], args[5])) is None
    assert "state is not contiguous" in str(reason("budget_step", [*args[:2], columns(args[2]), *args[3:]]))
    assert "logits has stride" in str(reason("budget_guard", (columns(logits), args[2], args[5])))
    assert "several devices" in str(reason("budget_step", [*args[:2], args[2].to("meta"), *args[3:]]))
