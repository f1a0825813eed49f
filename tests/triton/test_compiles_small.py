"""The small kernels compiled for compute capability 8.0 and 9.0, with no GPU: one launch, no spills, wide loads."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops.triton.add_rms_norm import add_rms_norm
from qwenopt.ops.triton.budget_guard import budget_guard
from qwenopt.ops.triton.budget_step import budget_step
from qwenopt.ops.triton.moe_route import moe_route
from qwenopt.ops.triton.qk_norm_rope import qk_norm_rope
from qwenopt.ops.triton.qk_norm_rope_append import qk_norm_rope_append
from qwenopt.ops.triton.qk_norm_rope_static_append import qk_norm_rope_static_append
from qwenopt.ops.triton.rms_norm import rms_norm
from qwenopt.ops.triton.silu_mul import silu_mul
from qwenopt.testing.budget_rows import random_rows
from qwenopt.testing.compiled import Kernel, compiled

BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, HALF, FP32], ids=str)


def only(capability: int, call: Callable[..., Any], *args: Any) -> Kernel:
    """The one kernel that the call launches."""
    (kernel,) = compiled(capability, call, *args)
    assert f".target sm_{'90a' if capability == 90 else capability}" in kernel.ptx
    assert kernel.spill_bytes == 0, f"{kernel.spill_bytes} bytes spilled"
    return kernel


def test_budget_step_compiles(capability: int) -> None:
    kernel = only(capability, budget_step, *random_rows(0))
    assert kernel.registers <= 64  # 32 programs of a warp on a multiprocessor at once
    assert kernel.shared_bytes == 0
    assert kernel.num_warps == 1, "threads of another warp would read what the first one has written"
    assert "bra" not in kernel.ptx.replace(".debug_abbrev", ""), "rows take different ways; a warp takes one"
    assert "fma" not in kernel.ptx, "a fused multiplication rounds once, the reference twice"


@DTYPES
def test_budget_guard_compiles(dtype: torch.dtype, capability: int) -> None:
    _, _, state, _, _, ids = random_rows(0)
    kernel = only(capability, budget_guard, torch.zeros(len(state), 50, dtype=dtype), state, ids)
    assert kernel.registers <= 64
    assert kernel.shared_bytes == 0
    assert "fma" not in kernel.ptx
    assert "div.rn.f32" in kernel.ptx


def wide(kernel: Kernel, way: str = "ld") -> int:
    """Accesses of 16 bytes a thread."""
    return len(re.findall(rf"{way}\.global\.v4\.b32|{way}\.global\.v2\.b64", kernel.ptx))


def rounds(kernel: Kernel, dtype: torch.dtype) -> bool:
    """Whether anything is cast to `dtype`."""
    return bool(re.search({BF16: r"cvt\.rn\.bf16", HALF: r"cvt\.rn\.f16"}[dtype], kernel.ptx))


def zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@DTYPES
@pytest.mark.parametrize(("rows", "cols"), [(1, 1024), (64, 4096), (1, 5120), (4096, 1024), (4096, 5120), (3, 16384)])
def test_norms_compile(rows: int, cols: int, dtype: torch.dtype, capability: int) -> None:
    x, weight = zeros(rows, cols, dtype=dtype), zeros(cols, dtype=dtype)
    for call, args, reads in ((rms_norm, (x, weight), 2), (add_rms_norm, (x, x, weight), 3)):
        kernel = only(capability, call, *args, 1e-6)
        assert kernel.registers * kernel.num_warps * 32 <= 65536
        assert wide(kernel) >= reads
        assert wide(kernel, "st") >= reads - 1
        assert dtype == FP32 or rounds(kernel, dtype)


def test_a_decode_norm_has_a_vector_for_each_thread(capability: int) -> None:
    kernel = only(capability, rms_norm, zeros(1, 1, 1024), zeros(1024), 1e-6)
    assert (kernel.num_warps, wide(kernel)) == (4, 2)
    assert kernel.registers <= 32


@DTYPES
@pytest.mark.parametrize("inter", [768, 3072, 25600])
def test_silu_mul_compiles(inter: int, dtype: torch.dtype, capability: int) -> None:
    kernel = only(capability, silu_mul, *zeros(4, 2 * inter, dtype=dtype).chunk(2, -1))
    assert kernel.registers <= 64
    assert wide(kernel) >= 2
    assert wide(kernel, "st") >= 1


@DTYPES
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tokens", [1, 512])
def test_qk_norm_rope_compiles(tokens: int, dim: int, dtype: torch.dtype, capability: int) -> None:
    q, k, _ = zeros(1, tokens, 48, dim, dtype=dtype).split([32, 8, 8], 2)
    weight, table = zeros(dim, dtype=dtype), zeros(1, tokens, dim, dtype=dtype)
    kernel = only(capability, qk_norm_rope, q, k, weight, weight, table, table, 1e-6)
    assert kernel.registers <= 128
    assert kernel.shared_bytes <= 2048
    if tokens > 1:
        assert wide(kernel) >= 4  # two halves of queries and of keys
        assert wide(kernel, "st") >= 4
    else:
        assert kernel.num_warps == 1


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tokens", [1, 512])
def test_qk_norm_rope_append_compiles(tokens: int, dim: int, coded: bool, capability: int) -> None:
    q, k, v = zeros(1, tokens, 48, dim).split([32, 8, 8], 2)
    weight, table = zeros(dim), zeros(1, tokens, dim)
    pools = [zeros(9, 8, 16, dim, dtype=torch.int8 if coded else BF16) for _ in range(2)]
    scales = [zeros(9, 8, 16, dtype=FP32) if coded else None for _ in range(2)]
    rest = (*pools, *scales, v.transpose(1, 2), torch.zeros(tokens, dtype=torch.int64))
    kernel = only(capability, qk_norm_rope_append, q, k, weight, weight, table, table, 1e-6, *rest)
    assert kernel.registers <= 128
    assert kernel.shared_bytes <= 2048
    if tokens > 1:
        assert wide(kernel) >= 6  # two halves each of queries, keys and values
        assert coded or wide(kernel, "st") >= 6
    else:
        assert kernel.num_warps == 1
    assert not coded or "div.rn.f32" in kernel.ptx
    assert "__assertfail" not in kernel.ptx


@pytest.mark.parametrize("tokens", [1, 512])
def test_qk_norm_rope_static_append_compiles(tokens: int, capability: int) -> None:
    q, k, v = zeros(1, tokens, 48, 128).split([32, 8, 8], 2)
    table, cache = zeros(1, tokens, 128), [zeros(1, 8, 1024, 128) for _ in range(2)]
    rest = (*cache, v.transpose(1, 2), torch.zeros((), dtype=torch.int64))
    kernel = only(capability, qk_norm_rope_static_append, q, k, zeros(128), zeros(128), table, table, 1e-6, *rest)
    assert kernel.registers <= 128
    assert kernel.shared_bytes <= 2048
    assert "__assertfail" in kernel.ptx, "a cache that is full stops the device, as in torch's own indexing"


@DTYPES
@pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (1024, 16), (60, 4)])
def test_moe_route_compiles(experts: int, top_k: int, dtype: torch.dtype, capability: int) -> None:
    kernel = only(capability, moe_route, zeros(7, experts, dtype=dtype), top_k, True)
    assert kernel.registers <= 128
    assert kernel.num_warps == max(1, 1 << (experts - 1).bit_length() >> 8)


@DTYPES
def test_one_column_compiles(dtype: torch.dtype, capability: int) -> None:
    """The compiler takes an argument of 1 for a constant, which the interpreter does not."""
    x, one = torch.zeros(4, 1, dtype=dtype), torch.ones(1, dtype=dtype)
    assert only(capability, rms_norm, x, one, 1e-6)
    assert only(capability, add_rms_norm, x, x, one, 1e-6)
    assert only(capability, silu_mul, x, x)
