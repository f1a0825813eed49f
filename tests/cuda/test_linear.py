"""linear, emulated: as accurate as eager, by matrix instructions and without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwenopt.ops.cuda import linear as kernels
from qwenopt.ops.linear import LINEAR
from qwenopt.testing.cases import Case, cases
from qwenopt.testing.emulated import Emulation, launches
from qwenopt.testing.formulas import FORMULAS
from qwenopt.testing.tolerance import assert_as_accurate

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
BF16 = torch.bfloat16


def check(emulation: Emulation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert kernels.accepts(x, weight, bias) is None
    found: Tensor = emulation.call(kernels.linear, x, weight, bias)
    assert_as_accurate(found, LINEAR.reference(x, weight, bias), FORMULAS["linear"](x, weight, bias))
    return found


@DTYPES
@pytest.mark.parametrize("case", [c for c in cases("linear") if c.name != "decode"], ids=str)
def test_cases(emulation: Emulation, case: Case, dtype: torch.dtype) -> None:
    check(emulation, *case.build(dtype))


# K: less than a warp's columns, one run of them, what the eight warps take at once and some more. N: parts of tiles.
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16])
@pytest.mark.parametrize(("k", "n"), [(8, 16), (128, 40), (1200, 17), (2072, 33)], ids=str)
def test_tiles(emulation: Emulation, rows: int, k: int, n: int) -> None:
    x, weight = torch.randn(rows, k).to(BF16), torch.randn(n, k).to(BF16)
    (launch,) = launches(kernels.linear, x, weight, None)
    assert launch.kernel == f"linear_bfloat16_{8 if rows <= 8 else 16}"
    found = check(emulation, x, weight, torch.randn(n).to(BF16) if rows == 2 else None)
    # A row does not depend on the rows beside it: every product is summed in one order.
    if rows > 8:
        assert torch.equal(found[:1], emulation.call(kernels.linear, x[:1], weight, None))


@DTYPES
def test_rows_that_are_apart(emulation: Emulation, dtype: torch.dtype) -> None:
    wide, weight = torch.randn(3, 5, 96).to(dtype), torch.randn(24, 80).to(dtype)
    check(emulation, wide[:, 2, :64], weight[:, 8:72], None)
    check(emulation, wide[:, 2, 1:65], weight[:, :64], None)  # at no multiple of 16 bytes


@DTYPES
def test_what_is_no_number_stays_in_its_place(emulation: Emulation, dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 136).to(dtype), torch.randn(20, 136).to(dtype)
    x[1, 3], weight[5, 135] = torch.nan, torch.inf
    found = emulation.call(kernels.linear, x, weight, None)
    assert found[1].isnan().all()
    assert found[0].isinf().nonzero().tolist() == [[5]]


def test_more_rows_are_torchs() -> None:
    assert launches(kernels.linear, torch.randn(17, 64), torch.randn(8, 64), None) == []
