"""qk_norm_rope, emulated: as accurate as eager, in its cast order; fused with kv_append, the same bits as apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops.cuda import kv_append
from qwenopt.ops.cuda import qk_norm_rope as kernels
from qwenopt.ops.qk_norm_rope import QK_NORM_ROPE
from qwenopt.testing.cases import Case, case, cases
from qwenopt.testing.emulated import Emulation
from qwenopt.testing.formulas import FORMULAS
from qwenopt.testing.tolerance import assert_as_accurate

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
EPS = 1e-6


@DTYPES
@pytest.mark.parametrize("case", cases("qk_norm_rope"), ids=str)
def test_cases(emulation: Emulation, case: Case, dtype: torch.dtype) -> None:
    args = case.build(dtype)
    assert kernels.accepts(*args) is None
    found = emulation.call(kernels.qk_norm_rope, *args)
    eager, truth = QK_NORM_ROPE.reference(*args), FORMULAS["qk_norm_rope"](*args)
    for one, same, true in zip(found, eager, truth, strict=True):
        assert one.transpose(1, 2).is_contiguous()
        assert_as_accurate(one, same, true)


def test_the_cast_order_is_eagers(emulation: Emulation) -> None:
    args = case("qk_norm_rope", "prefill").build(torch.bfloat16)
    for one, same in zip(emulation.call(kernels.qk_norm_rope, *args), QK_NORM_ROPE.reference(*args), strict=True):
        assert (one != same).float().mean() < 2e-3, "another order differs in a large share of the elements"


@DTYPES
def test_strides(emulation: Emulation, dtype: torch.dtype) -> None:
    """Heads of one projection, at an address that no wide access fits; tables whose rows are apart."""
    b, s, h, g, d = 2, 3, 4, 2, 32
    _, _, q_weight, k_weight, cos, sin, _ = case("qk_norm_rope", "head_dim 72").build(dtype)
    cos, sin = (t[..., :d].contiguous() for t in (cos, sin))
    packed = torch.randn(b * s * ((h + g) * d + 3) + 1).to(dtype)[1:].view(b, s, (h + g) * d + 3)
    q, k = packed[..., : h * d].unflatten(-1, (h, d)), packed[..., h * d : (h + g) * d].unflatten(-1, (g, d))
    wide = torch.stack((cos, sin), 2)
    weights = (q_weight[:d].contiguous(), k_weight[:d].contiguous())
    strided = emulation.call(kernels.qk_norm_rope, q, k, *weights, wide[:, :, 0], wide[:, :, 1], EPS)
    plain = emulation.call(kernels.qk_norm_rope, q.contiguous(), k.contiguous(), *weights, cos, sin, EPS)
    assert torch.equal(strided[0], plain[0])
    assert torch.equal(strided[1], plain[1])


def fused(
    dtype: torch.dtype, pool: torch.dtype, name: str
) -> tuple[tuple[Any, ...], list[Tensor | None], Tensor, Tensor]:
    rope = case("qk_norm_rope", name).build(dtype)
    batch, seq, groups, dim = rope[1].shape
    pools = [torch.full((6, groups, 16, dim), -9).to(pool) for _ in range(2)]
    scales = [torch.full((6, groups, 16), -9.0) if pool == torch.int8 else None for _ in range(2)]
    v = torch.randn(batch, seq, groups, dim).to(dtype).transpose(1, 2)
    slots = torch.randperm(96)[: batch * seq]
    slots[batch * seq // 2] = -1
    return rope, [*pools, *scales], v, slots


@pytest.mark.parametrize("name", ["prefill", "tables of each row", "head_dim 72", "head_dim 256"])
@pytest.mark.parametrize("coded", [False, True], ids=["plain", "int8"])
@DTYPES
def test_fused_is_the_same_as_apart(emulation: Emulation, dtype: torch.dtype, coded: bool, name: str) -> None:
    rope, pools, v, slots = fused(dtype, torch.int8 if coded else dtype, name)
    same = [None if t is None else t.clone() for t in pools]
    assert kernels.accepts_append(*rope, *pools, v, slots) is None
    found = emulation.call(kernels.qk_norm_rope_append, *rope, *pools, v, slots)
    q, k = emulation.call(kernels.qk_norm_rope, *rope)
    emulation.call(kv_append.kv_append, *same, k, v, slots)
    assert torch.equal(found, q)
    for a, b in zip(pools, same, strict=True):
        assert a is b is None or torch.equal(a, b)
    assert (pools[0] != -9).any()
