"""linear's kernels, interpreted, against float64, and which of them run for which shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenopt.ops.linear import linear as reference
from qwenopt.testing.cases import Case, cases
from qwenopt.testing.interpreted import Run
from qwenopt.testing.tolerance import assert_as_accurate

if not pytest.importorskip("triton", reason="triton is not installed (pip install triton)"):
    raise AssertionError

from qwenopt.triton_kernels.linear import GEMV, GEMV_WIDE, SKINNY, SKINNY_WIDE, Plan, plan

HALF, FP32 = torch.float16, torch.float32
FEW, MANY = 1, 40  # multiprocessors: K is cut for many


def build(rows: int, n: int, k: int, *, bias: bool = False, dtype: torch.dtype = HALF) -> tuple[Any, ...]:
    x, weight = torch.randn(rows, k), torch.randn(n, k) * k**-0.5
    return tuple(None if t is None else t.to(dtype) for t in (x, weight, torch.randn(n) if bias else None))


def check(run: Run, args: tuple[Any, ...], num_sms: int = FEW) -> Tensor:
    found = run("linear.planned_linear", num_sms, *args)[0]
    truth = reference(*(None if t is None else t.double() for t in args))
    assert_as_accurate(found, reference(*args), truth)
    assert found.is_contiguous()
    return found


@pytest.mark.parametrize("dtype", [HALF, FP32], ids=str)
@pytest.mark.parametrize("case", cases("linear"), ids=str)
def test_the_cases_of_all_providers(run: Run, case: Case, dtype: torch.dtype) -> None:
    check(run, case.build(dtype))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("num_sms", [FEW, MANY])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17])
def test_rows(run: Run, rows: int, num_sms: int, bias: bool) -> None:
    check(run, build(rows, 200, 1024, bias=bias), num_sms)


@pytest.mark.parametrize("k", [256, 1000, 1280, 37])
@pytest.mark.parametrize("rows", [1, 3])
def test_inner_dimensions(run: Run, rows: int, k: int) -> None:
    check(run, build(rows, 100, k), MANY)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("n", [160, 150])
def test_wide_tiles(run: Run, rows: int, n: int) -> None:
    assert plan(rows, n, 256, FEW).tile in (GEMV_WIDE, SKINNY_WIDE)
    check(run, build(rows, n, 256), FEW)


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_and_weights_are_read_where_they_lie(run: Run, rows: int) -> None:
    x, weight, _ = build(rows, 48, 256)
    found = check(run, (x, weight, None))
    wide = torch.full((rows, 300), torch.nan, dtype=HALF)
    wide[:, :256] = x
    fused = torch.full((96, 264), torch.nan, dtype=HALF)  # say, the keys' part of one weight for queries, keys, values
    fused[48:, :256] = weight
    for moved in ((wide[:, :256], fused[48:, :256], None), (x.t().contiguous().t(), weight, None)):
        assert torch.equal(run("linear.planned_linear", FEW, *moved)[0], found)


@pytest.mark.parametrize("num_sms", [FEW, MANY])
def test_rows_do_not_depend_on_each_other(run: Run, num_sms: int) -> None:
    x, weight, bias = build(7, 64, 512, bias=True)
    order = torch.tensor([3, 6, 0, 1, 5, 2, 4])
    found, moved = (run("linear.planned_linear", num_sms, rows, weight, bias)[0] for rows in (x, x[order]))
    assert torch.equal(moved, found[order])


@settings(max_examples=40)
@given(st.integers(1, 16), st.integers(1, 90), st.integers(1, 600), st.booleans(), st.sampled_from([1, 8, 60]))
def test_random_sizes(run: Run, rows: int, n: int, k: int, bias: bool, num_sms: int) -> None:
    torch.manual_seed(n)
    check(run, build(rows, n, k, bias=bias), num_sms)


SHAPES = {"k_proj": (1024, 1024), "o_proj 8B": (4096, 4096), "down 8B": (4096, 12288), "lm_head": (151936, 1024)}


@pytest.mark.parametrize(
    ("name", "one", "few"),
    [
        ("k_proj", Plan(GEMV, 0), Plan(SKINNY, 4)),
        ("o_proj 8B", Plan(GEMV, 0), Plan(SKINNY, 1)),
        ("down 8B", Plan(GEMV, 0), Plan(SKINNY, 1)),
        ("lm_head", Plan(GEMV_WIDE, 0), Plan(SKINNY_WIDE, 1)),
    ],
)
def test_plans_on_an_h100(name: str, one: Plan, few: Plan) -> None:
    assert plan(1, *SHAPES[name], 132) == one
    assert plan(2, *SHAPES[name], 132) == plan(16, *SHAPES[name], 132) == few


@settings(max_examples=200)
@given(st.integers(2, 16), st.integers(1, 200_000), st.integers(1, 30_000), st.sampled_from([1, 20, 108, 132]))
def test_every_part_of_k_has_its_steps(rows: int, n: int, k: int, num_sms: int) -> None:
    p = plan(rows, n, k, num_sms)
    assert p.splits == 1 or (k > p.splits * p.tile.block_k and n <= num_sms * p.tile.block_n)


def test_one_row_is_not_cut() -> None:
    assert plan(1, 1024, 1024, 132).splits == 0
