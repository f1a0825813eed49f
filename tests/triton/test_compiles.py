"""The kernels compiled for compute capability 8.0 and 9.0, with no GPU: shared memory, spills, matrix instructions."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from qwenopt.ops.triton.kv_append import kv_append
from qwenopt.ops.triton.paged_attention import planned_attention
from qwenopt.testing.compiled import Kernel, assert_fits, compiled, wide_copies

BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32
# A few of a thread's 255 registers. int8: dequantising needs more, on 8.0 up to 84 bytes with triton 3.7.1 and 180 with
# 3.6.0 (2026-11-25).
MAX_SPILL_BYTES = {True: 192, False: 32}
NUM_SMS = 108


def attention(
    rows: int,
    tokens: int,
    *,
    dtype: torch.dtype = BF16,
    int8: bool = False,
    heads: int = 32,
    kv_heads: int = 4,
    dim: int = 128,
    page_size: int = 16,
    window: int = 0,
    mask: bool = False,
) -> tuple[Any, ...]:
    batch = rows if mask else 1
    q = torch.zeros(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)
    pool = torch.zeros(2, kv_heads, page_size, dim, dtype=torch.int8 if int8 else dtype)
    scale = torch.zeros(pool.shape[:3]) if int8 else None
    table = torch.zeros(rows, 32, dtype=torch.int32)
    starts = None if mask else torch.zeros(rows + 1, dtype=torch.int32)
    seen = torch.ones(1, 1, tokens, 32 * page_size, dtype=torch.bool) if mask else None
    return q, pool, pool, scale, scale, table, starts, torch.zeros(tokens).long(), seen, window, dim**-0.5


def kernels(capability: int, args: tuple[Any, ...]) -> dict[str, Kernel]:
    found = compiled(capability, planned_attention, (NUM_SMS, capability // 10), *args)
    return {kernel.name: kernel for kernel in found}


DECODE_CASES = {
    "pages of 16": {},
    "pages of 64": {"page_size": 64},
    "pages of 256": {"page_size": 256},
    "int8": {"int8": True, "page_size": 64},
    "head_dim 64": {"dim": 64, "heads": 16, "kv_heads": 8},
    "head_dim 256": {"dim": 256},
    "group of 5": {"heads": 40, "kv_heads": 8},
    "group of 16": {"heads": 64},
    "float16": {"dtype": HALF},
    "float32": {"dtype": FP32},
    "float32 int8": {"dtype": FP32, "int8": True},
    "window": {"window": 1024},
    "batch with a mask": {"mask": True},
}


@pytest.mark.parametrize("name", DECODE_CASES)
def test_decode_compiles(name: str, capability: int) -> None:
    case = DECODE_CASES[name]
    found = kernels(capability, attention(16, 1 if case.get("mask") else 16, **case))
    assert set(found) == {"flat_kernel", "combine_kernel"}
    for kernel in found.values():
        assert f".target sm_{'90a' if capability == 90 else capability}" in kernel.ptx
        assert_fits(kernel, capability, MAX_SPILL_BYTES[case.get("int8", False)])
    if name != "float32 int8":  # there a thread has 8 bytes of a tile
        assert wide_copies(found["flat_kernel"]) >= 4
    assert ("mma.sync" in found["flat_kernel"].ptx) == (case.get("dtype") != FP32)


def test_heads_of_less_than_a_matrix_instruction_compile(capability: int) -> None:
    """It sums over 16 products, the interpreter over any number."""
    for dim in (2, 8):
        assert set(kernels(capability, attention(16, 16, dim=dim))) == {"flat_kernel", "combine_kernel"}


CHUNK_CASES = {
    "head_dim 64": {"dim": 64, "heads": 16, "kv_heads": 4},
    "head_dim 128": {},
    "head_dim 128 int8": {"int8": True},
    "head_dim 256": {"dim": 256},
    "float32": {"dtype": FP32},
}


@pytest.mark.parametrize("name", CHUNK_CASES)
def test_a_chunk_compiles(name: str, capability: int) -> None:
    case = CHUNK_CASES[name]
    found = kernels(capability, attention(1, 20, **case))
    assert set(found) == {"flat_kernel", "combine_kernel"}
    for kernel in found.values():
        assert_fits(kernel, capability, MAX_SPILL_BYTES[case.get("int8", False)])


PREFILL_CASES = {
    "pages of 16": {},
    "pages of 256": {"page_size": 256},
    "int8": {"int8": True, "page_size": 64},
    "head_dim 64": {"dim": 64, "heads": 16, "kv_heads": 8},
    "head_dim 256": {"dim": 256},
    "group of 5": {"heads": 40, "kv_heads": 8},
    "float32": {"dtype": FP32},
    "window": {"window": 1024},
    "mask": {"mask": True},
}


@pytest.mark.parametrize("name", PREFILL_CASES)
def test_prefill_compiles_to_matrix_instructions(name: str, capability: int) -> None:
    case = PREFILL_CASES[name]
    found = kernels(capability, attention(4, 2048, **case))
    assert set(found) == ({"blocks_kernel"} if case.get("mask") else {"flat_kernel", "combine_kernel", "blocks_kernel"})
    kernel = found["blocks_kernel"]
    assert_fits(kernel, capability, MAX_SPILL_BYTES[case.get("int8", False)])
    assert wide_copies(kernel) >= 4
    tensor_cores = case.get("dtype") != FP32
    assert ("wgmma.mma_async" in kernel.ptx) == (tensor_cores and capability == 90)
    assert ("mma.sync" in kernel.ptx) == (tensor_cores and capability == 80)


@pytest.mark.parametrize("pool", [BF16, HALF, FP32, torch.int8], ids=str)
def test_kv_append_compiles(pool: torch.dtype, capability: int) -> None:
    dtype = BF16 if pool == torch.int8 else pool
    pools = [torch.zeros(2, 8, 16, 128, dtype=pool) for _ in range(2)]
    scales = [torch.zeros(2, 8, 16) if pool == torch.int8 else None for _ in range(2)]
    x = torch.zeros(1, 8, 4, 128, dtype=dtype)
    (kernel,) = compiled(capability, kv_append, *pools, *scales, x, x, torch.zeros(4).long())
    assert_fits(kernel, capability, MAX_SPILL_BYTES[False])
    assert kernel.shared_bytes <= 1024
    # 16 bytes a thread on either side, or what 8 codes have.
    assert re.search(r"ld\.global\.v4\.b32", kernel.ptx)
    assert re.search(r"st\.global\.v2\.b32" if pool == torch.int8 else r"st\.global\.v4\.b32", kernel.ptx)
    assert "fma" not in kernel.ptx, "a fused multiplication rounds once, the reference twice: other codes"
