"""linear_group's kernels, interpreted: each product as accurate as eager's, and the same bits as linear's alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenopt.ops.linear_group import LINEAR_GROUP
from qwenopt.testing.cases import Case, cases
from qwenopt.testing.formulas import FORMULAS
from qwenopt.testing.interpreted import Run
from qwenopt.testing.tolerance import assert_as_accurate

if not pytest.importorskip("triton", reason="triton is not installed (pip install triton)"):
    raise AssertionError

from qwenopt.triton_kernels.linear import GEMV, GEMV_WIDE, SKINNY, SKINNY_WIDE
from qwenopt.triton_kernels.linear_group import plan

HALF, FP32 = torch.float16, torch.float32
FEW, MANY = 1, 40  # multiprocessors


def build(rows: int, columns: tuple[int, ...], k: int) -> tuple[Any, ...]:
    weights = [(torch.randn(n, k) * k**-0.5).to(HALF) for n in columns]
    return torch.randn(rows, k).to(HALF), weights


def check(run: Run, args: tuple[Any, ...], num_sms: int = FEW) -> list[Tensor]:
    found = run("linear_group.planned_linear_group", num_sms, *args)[0]
    eager, truth = LINEAR_GROUP.reference(*args), FORMULAS["linear_group"](*args)
    assert len(found) == len(eager)
    for one, same, true in zip(found, eager, truth, strict=True):
        assert_as_accurate(one, same, true)
        assert one.is_contiguous()
    return list(found)


@pytest.mark.parametrize("dtype", [HALF, FP32], ids=str)
@pytest.mark.parametrize("case", cases("linear_group"), ids=str)
def test_the_cases_of_all_providers(run: Run, case: Case, dtype: torch.dtype) -> None:
    check(run, case.build(dtype))


@pytest.mark.parametrize("num_sms", [FEW, MANY])
@pytest.mark.parametrize("columns", [(96, 40, 33), (40, 96), (1, 1, 1), (64, 32, 32)])
@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_rows(run: Run, rows: int, columns: tuple[int, ...], num_sms: int) -> None:
    check(run, build(rows, columns, 520), num_sms)


@pytest.mark.parametrize("rows", [1, 5])
def test_each_is_what_linear_gives_alone(run: Run, rows: int) -> None:
    """With tiles of the same shape; more programs for one weight change nothing."""
    x, weights = build(rows, (64, 36, 32), 300)
    found = run("linear_group.planned_linear_group", MANY, x, weights)[0]
    for one, weight in zip(found, weights, strict=True):
        if rows == 1:
            assert torch.equal(one, run("linear.planned_linear", MANY, x, weight, None)[0])
        assert torch.equal(one, run("linear_group.planned_linear_group", MANY, x, [weight, weight])[0][1])


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_and_weights_are_read_where_they_lie(run: Run, rows: int) -> None:
    x, weights = build(rows, (48, 16, 16), 256)
    found = check(run, (x, weights))
    wide = torch.full((rows, 300), torch.nan, dtype=HALF)
    wide[:, :256] = x
    fused = torch.full((80, 264), torch.nan, dtype=HALF)
    fused[:, :256] = torch.cat(weights)
    for moved in ((wide[:, :256], [*fused[:, :256].split((48, 16, 16))]), (x.t().contiguous().t(), weights)):
        for one, same in zip(run("linear_group.planned_linear_group", FEW, *moved)[0], found, strict=True):
            assert torch.equal(one, same)


@settings(max_examples=30)
@given(st.integers(1, 16), st.lists(st.integers(1, 90), min_size=2, max_size=3), st.integers(1, 600))
def test_random_sizes(run: Run, rows: int, columns: list[int], k: int) -> None:
    torch.manual_seed(k)
    check(run, build(rows, tuple(columns), k), MANY)


def test_plans_on_an_h100() -> None:
    assert plan(1, 4096, 132) == plan(1, 6144, 132) == GEMV
    assert plan(1, 50_000, 132) == GEMV_WIDE
    assert plan(2, 4096, 132) == plan(16, 6144, 132) == SKINNY
    assert plan(2, 50_000, 132) == SKINNY_WIDE


def test_what_is_not_for_the_kernel() -> None:
    accepts = LINEAR_GROUP.providers[0].accepts
    x, weights = build(2, (8, 8, 8), 16)
    assert accepts(x, weights) is None
    assert accepts(x, weights[:1]) == "1 weights (the kernel has 2 or 3)"
    assert "4 weights" in str(accepts(x, [*weights, weights[0]]))
    assert "mixed dtypes" in str(accepts(x, [weights[0], weights[1].float()]))
    assert "weights[1] has stride 8" in str(accepts(x, [weights[0], torch.ones(16, 8, dtype=HALF).t()]))
