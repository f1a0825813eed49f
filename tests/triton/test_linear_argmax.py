"""linear_argmax's kernels, interpreted: where the largest of the logits is that `linear` makes; compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenopt.ops.linear_argmax import LINEAR_ARGMAX
from qwenopt.ops.triton.linear_argmax import planned_linear_argmax
from qwenopt.testing.cases import Case, cases
from qwenopt.testing.compiled import assert_fits, compiled
from qwenopt.testing.interpreted import Run

if not pytest.importorskip("triton", reason="triton is not installed (pip install triton)"):
    raise AssertionError

HALF, FP32, BF16 = torch.float16, torch.float32, torch.bfloat16
FEW, MANY = 1, 40  # multiprocessors


def kernel(run: Run, num_sms: int, *args: Any) -> Tensor:
    found: Tensor = run("linear_argmax.planned_linear_argmax", num_sms, *args)[0]
    return found


def first_of_the_largest(logits: Tensor) -> Tensor:
    """NaN is larger than all numbers."""
    return logits.sort(dim=-1, descending=True, stable=True)[1][:, :1]


def check(run: Run, args: tuple[Any, ...], num_sms: int = FEW) -> Tensor:
    """Bit for bit the choice from what linear's own kernels write: rounded where they round."""
    found = kernel(run, num_sms, *args)
    logits = run("linear.planned_linear", num_sms, *args)[0].reshape(-1, args[1].shape[0])
    assert torch.equal(found, first_of_the_largest(logits))
    return found


@pytest.mark.parametrize("dtype", [HALF, FP32], ids=str)
@pytest.mark.parametrize("case", cases("linear_argmax"), ids=str)
def test_the_cases_of_all_providers(run: Run, case: Case, dtype: torch.dtype) -> None:
    args = case.build(dtype)
    assert torch.equal(kernel(run, FEW, *args), LINEAR_ARGMAX.reference(*args))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_sms", [FEW, MANY])
@pytest.mark.parametrize("n", [1, 33, 64, 200])
@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_rows(run: Run, rows: int, n: int, num_sms: int, bias: bool) -> None:
    args = (torch.randn(rows, 520), torch.randn(n, 520), torch.randn(n))
    check(run, tuple(t.to(HALF) for t in args[: 2 + bias]) + (() if bias else (None,)), num_sms)


@pytest.mark.parametrize("rows", [1, 3])
def test_more_parts_than_are_compared_at_once(run: Run, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenopt.triton_kernels import linear_argmax

    monkeypatch.setattr(linear_argmax, "BLOCK", 4)
    x, weight = torch.randint(-1, 2, (rows, 32)).to(HALF), torch.randint(-2, 3, (700, 32)).to(HALF)
    check(run, (x, weight, None))


@pytest.mark.parametrize("rows", [1, 2])
def test_equal_logits_infinities_and_nan(run: Run, rows: int) -> None:
    x, weight = torch.ones(rows, 8).to(HALF), torch.full((300, 8), -torch.inf).to(HALF)
    assert kernel(run, FEW, x, weight, None).tolist() == [[0]] * rows
    weight[[170, 37, 299]] = 2.0
    assert kernel(run, FEW, x, weight, None).tolist() == [[37]] * rows
    weight[200], weight[201] = torch.inf, 1.0
    assert kernel(run, FEW, x, weight, None).tolist() == [[200]] * rows
    weight[250] = torch.nan
    assert kernel(run, FEW, x, weight, None).tolist() == [[250]] * rows
    weight[:], weight[180], weight[70] = -1.0, 0.0, -(2.0**-24)
    # -8 * 2^-24 / 2^10 rounds to -0, which is not less than 0.
    assert kernel(run, FEW, (x / 1024).to(HALF), weight, None).tolist() == [[70]] * rows


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_and_weights_are_read_where_they_lie(run: Run, rows: int) -> None:
    x, weight = torch.randn(rows, 256).to(HALF), torch.randn(90, 256).to(HALF)
    found = check(run, (x, weight, None))
    wide = torch.full((90, 264), torch.nan, dtype=HALF)
    wide[:, :256] = weight
    assert torch.equal(kernel(run, FEW, x.t().contiguous().t(), wide[:, :256], None), found)


@settings(max_examples=30)
@given(st.integers(1, 16), st.integers(1, 200), st.integers(1, 300))
def test_random_sizes(run: Run, rows: int, n: int, k: int) -> None:
    torch.manual_seed(k)
    check(run, (torch.randn(rows, k).to(HALF), torch.randn(n, k).to(HALF), None), MANY)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "dtype"), [(1, BF16), (16, BF16), (1, HALF), (16, HALF), (1, FP32)], ids=str)
def test_compiles(rows: int, dtype: torch.dtype, bias: bool, capability: int) -> None:
    x, weight, b = (torch.empty(*shape, dtype=dtype) for shape in ((rows, 1024), (151936, 1024), (151936,)))
    found = compiled(capability, planned_linear_argmax, 132, x, weight, b if bias else None)
    names = ["argmax_gemv_kernel" if rows == 1 else "argmax_skinny_kernel", "argmax_kernel"]
    assert [one.name for one in found] == names
    for one in found:
        assert_fits(one, capability, 32)
    assert ("mma.sync" in found[0].ptx) == (rows > 1)
