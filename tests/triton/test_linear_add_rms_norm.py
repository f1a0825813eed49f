"""linear_add_rms_norm's kernels, interpreted: the same bits as linear and add_rms_norm one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwenopt.ops.linear_add_rms_norm import LINEAR_ADD_RMS_NORM
from qwenopt.testing.cases import Case, cases
from qwenopt.testing.formulas import FORMULAS
from qwenopt.testing.interpreted import Run
from qwenopt.testing.tolerance import assert_as_accurate

if not pytest.importorskip("triton", reason="triton is not installed (pip install triton)"):
    raise AssertionError

from qwenopt.triton_kernels.linear import plan

HALF, FP32 = torch.float16, torch.float32
FEW, MANY = 1, 40  # multiprocessors: K is cut for many


def check(run: Run, args: tuple[Any, ...], num_sms: int) -> None:
    x, weight, residual, norm_weight, eps = args
    found = run("linear_add_rms_norm.planned_linear_add_rms_norm", num_sms, *args)[0]
    product = run("linear.planned_linear", num_sms, x, weight, None)[0]
    apart = run("add_rms_norm", product, residual, norm_weight, eps)[0]
    eager, truth = LINEAR_ADD_RMS_NORM.reference(*args), FORMULAS["linear_add_rms_norm"](*args)
    for one, same, by_torch, true in zip(found, apart, eager, truth, strict=True):
        assert torch.equal(one, same)
        assert one.is_contiguous()
        assert_as_accurate(one, by_torch, true)


@pytest.mark.parametrize("num_sms", [FEW, MANY])
@pytest.mark.parametrize("dtype", [HALF, FP32], ids=str)
@pytest.mark.parametrize("case", cases("linear_add_rms_norm"), ids=str)
def test_the_cases_of_all_providers(run: Run, case: Case, dtype: torch.dtype, num_sms: int) -> None:
    check(run, case.build(dtype), num_sms)


@pytest.mark.parametrize("n", [96, 130])
@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_rows(run: Run, rows: int, n: int) -> None:
    x, weight, residual = torch.randn(rows, 1024), torch.randn(n, 1024) / 32, torch.randn(rows, n)
    assert (plan(min(rows, 16), n, 1024, MANY).splits > 1) == (rows > 1), "here K is cut"
    check(run, (*(t.to(HALF) for t in (x, weight, residual, torch.rand(n))), 1e-6), MANY)


def test_a_residual_that_is_part_of_something_wider(run: Run) -> None:
    x, weight = torch.randn(3, 1024).to(HALF), (torch.randn(96, 1024) / 32).to(HALF)
    wide = torch.randn(3, 200).to(HALF)
    check(run, (x, weight, wide[:, :96], torch.rand(96).to(HALF), 1e-6), MANY)
