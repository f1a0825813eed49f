"""linear_silu_mul's kernels, interpreted: as accurate as eager, rounded where eager rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenopt.ops.linear_silu_mul import LINEAR_SILU_MUL
from qwenopt.testing.cases import Case, cases
from qwenopt.testing.formulas import FORMULAS
from qwenopt.testing.interpreted import Run
from qwenopt.testing.tolerance import assert_as_accurate

if not pytest.importorskip("triton", reason="triton is not installed (pip install triton)"):
    raise AssertionError

from qwenopt.triton_kernels.linear_silu_mul import plan

HALF, FP32 = torch.float16, torch.float32
FEW, MANY = 1, 40  # multiprocessors


def build(rows: int, n: int, k: int) -> tuple[Any, ...]:
    weights = (3 * torch.randn(n, k) * k**-0.5, torch.randn(n, k) * k**-0.5)
    return tuple(t.to(HALF) for t in (torch.randn(rows, k), *weights))


def kernel(run: Run, num_sms: int, *args: Any) -> Tensor:
    found: Tensor = run("linear_silu_mul.planned_linear_silu_mul", num_sms, *args)[0]
    return found


def check(run: Run, args: tuple[Any, ...], num_sms: int = FEW) -> Tensor:
    found = kernel(run, num_sms, *args)
    assert_as_accurate(found, LINEAR_SILU_MUL.reference(*args), FORMULAS["linear_silu_mul"](*args))
    assert found.is_contiguous()
    return found


@pytest.mark.parametrize("dtype", [HALF, FP32], ids=str)
@pytest.mark.parametrize("case", cases("linear_silu_mul"), ids=str)
def test_the_cases_of_all_providers(run: Run, case: Case, dtype: torch.dtype) -> None:
    check(run, case.build(dtype))


@pytest.mark.parametrize("num_sms", [FEW, MANY])
@pytest.mark.parametrize("n", [1, 33, 64, 200])
@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_rows(run: Run, rows: int, n: int, num_sms: int) -> None:
    check(run, build(rows, n, 520), num_sms)


@pytest.mark.parametrize("rows", [1, 4])
def test_casts_are_where_eager_has_them(run: Run, rows: int) -> None:
    """As in test_small_ops: of two products of 64 terms summed in another order, 2 * 2 sqrt(64) 2^-24 / 2^-11 = 0.4 %
    are rounded to another last bit; with a cast left out, every other result is.
    """
    args = build(rows, 2000, 64)
    found, eager = kernel(run, MANY, *args), LINEAR_SILU_MUL.reference(*args)
    assert (found != eager).float().mean() < 0.005


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_and_weights_are_read_where_they_lie(run: Run, rows: int) -> None:
    x, gate, up = build(rows, 48, 256)
    found = check(run, (x, gate, up))
    both = torch.full((96, 264), torch.nan, dtype=HALF)
    both[:, :256] = torch.cat((gate, up))
    moved = (x.t().contiguous().t(), both[:48, :256], both[48:, :256])
    assert torch.equal(kernel(run, FEW, *moved), found)
    assert torch.equal(kernel(run, FEW, x, gate, both[48:, :256]), found), "strides of its own for each"


@settings(max_examples=30)
@given(st.integers(1, 16), st.integers(1, 90), st.integers(1, 600))
def test_random_sizes(run: Run, rows: int, n: int, k: int) -> None:
    torch.manual_seed(k)
    check(run, build(rows, n, k), MANY)


@pytest.mark.parametrize(("n", "one", "few"), [(3072, 2, 16), (4096, 2, 16), (12288, 8, 32)])
def test_plans_on_an_h100(n: int, one: int, few: int) -> None:
    assert plan(1, n, 132).block_n == one
    assert plan(2, n, 132).block_n == plan(16, n, 132).block_n == few
