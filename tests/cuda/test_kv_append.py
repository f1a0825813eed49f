"""kv_append, emulated: every slot gets its token, bit for bit, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops.cuda import kv_append as kernels
from qwenopt.ops.kv_append import KV_APPEND
from qwenopt.testing.cases import Case, cases
from qwenopt.testing.emulated import Emulation

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
POOLS = pytest.mark.parametrize("pool", [torch.float32, torch.bfloat16, torch.int8], ids=str)


def pools(pages: int, groups: int, page_size: int, dim: int, dtype: torch.dtype) -> list[Tensor | None]:
    shape = (pages, groups, page_size, dim)
    scales = [torch.full(shape[:3], -9.0) if dtype == torch.int8 else None for _ in range(2)]
    return [*(torch.full(shape, -9).to(dtype) for _ in range(2)), *scales]


def check(emulation: Emulation, args: tuple[Any, ...]) -> None:
    same = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
    assert kernels.accepts(*args) is None
    emulation.call(kernels.kv_append, *args)
    KV_APPEND.reference(*same)
    for found, wanted in zip(args[:4], same[:4], strict=True):
        assert found is wanted is None or torch.equal(found, wanted)


@DTYPES
@pytest.mark.parametrize("case", cases("kv_append"), ids=str)
def test_cases(emulation: Emulation, case: Case, dtype: torch.dtype) -> None:
    check(emulation, case.build(dtype))


@DTYPES
@POOLS
@pytest.mark.parametrize("shape", [(3, 2, 1, 128), (2, 3, 7, 36), (1, 1, 3, 250), (1, 2, 2, 64)], ids=str)
def test_tokens_go_to_their_slots(
    emulation: Emulation, shape: tuple[int, ...], pool: torch.dtype, dtype: torch.dtype
) -> None:
    b, g, s, d = shape
    # As a model lays them out: transposed from [B, S, G, D], a part of a wider tensor.
    k, v = (torch.randn(b, s, g + 1, d + 3).to(dtype)[:, :, 1:, 2 : d + 2].transpose(1, 2) for _ in range(2))
    made = pools(b * s // 16 + 3, g, 16, d, pool)
    slots = torch.randperm(made[0].shape[0] * 16)[: b * s]  # type: ignore[union-attr]
    slots[0] = -1
    check(emulation, (*made, k, v, slots))


def test_a_slot_that_the_pool_has_not_is_left_out(emulation: Emulation) -> None:
    made = pools(2, 1, 16, 64, torch.bfloat16)
    k = torch.randn(1, 1, 3, 64).bfloat16()
    emulation.call(kernels.kv_append, *made, k, k, torch.tensor([32, 3, 1 << 60]))
    written = (made[0] != -9).any(-1).nonzero().tolist()
    assert written == [[0, 0, 3]]


@DTYPES
def test_codes_of_zeros_tiny_and_large_numbers(emulation: Emulation, dtype: torch.dtype) -> None:
    x = torch.zeros(1, 1, 7, 32)
    x[0, 0, 1, 3] = 1e-30
    x[0, 0, 2] = 3e38 * torch.linspace(-1, 1, 32)
    x[0, 0, 3, ::2], x[0, 0, 3, 5] = 2.5, 127.0  # halves: to even
    x[0, 0, 4, 7] = 1e-38
    x[0, 0, 5, 0] = torch.nan
    x[0, 0, 6, 0] = torch.inf
    x = x.to(dtype)
    made = pools(1, 1, 16, 32, torch.int8)
    emulation.call(kernels.kv_append, *made, x, x, torch.arange(7))
    codes, scales = made[0][0, 0, :7], made[2][0, 0, :7]  # type: ignore[index]
    assert scales[5:].isnan().all(), "a NaN must not become a number"
    found, true = codes[:5].float() * scales[:5, None], x[0, 0, :5].float()
    assert (found - true).abs().le(true.abs().amax(-1, keepdim=True) / 253 + 4e-37).all()
    assert codes[3, :6].tolist() == [2, 0, 2, 0, 2, 127]
