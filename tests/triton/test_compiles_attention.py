"""attention over keys in one piece, compiled for compute capability 8.0 and 9.0, with no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwenopt.ops.triton.attention import planned_attention
from qwenopt.testing.compiled import Kernel, assert_fits, compiled, wide_copies

BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32
MAX_SPILL_BYTES = 48  # a few of a thread's 255 registers: on 8.0 up to 32 bytes with triton 3.7.1 and 40 with 3.6.0
NUM_SMS = 108
CASES: dict[str, dict[str, Any]] = {
    "group of 8": {},
    "group of 2": {"heads": 16, "kv_heads": 8},
    "group of 5": {"heads": 40, "kv_heads": 8},
    "head_dim 64": {"dim": 64},
    "head_dim 256": {"dim": 256},
    "float16": {"dtype": HALF},
    "float32": {"dtype": FP32},
    "mask": {"mask": True},
}


def kernels(
    capability: int,
    seq: int,
    length: int,
    *,
    batch: int = 2,
    heads: int = 32,
    kv_heads: int = 4,
    dim: int = 128,
    dtype: torch.dtype = BF16,
    mask: bool = False,
) -> dict[str, Kernel]:
    q = torch.empty(batch, seq, heads, dim, dtype=dtype).transpose(1, 2)
    cache = torch.empty(batch, kv_heads, length, dim, dtype=dtype)
    seen = torch.ones(batch, 1, seq, length, dtype=torch.bool) if mask else None
    args = (q, cache, cache, seen, torch.zeros(seq).long(), False, dim**-0.5)
    found = compiled(capability, planned_attention, (NUM_SMS, capability // 10), *args)
    for kernel in found:
        assert_fits(kernel, capability, MAX_SPILL_BYTES)
    return {kernel.name: kernel for kernel in found}


@pytest.mark.parametrize("name", CASES)
def test_decode(name: str, capability: int) -> None:
    found = kernels(capability, 1, 4096, **CASES[name])
    assert set(found) == {"flat_kernel", "combine_kernel"}
    assert wide_copies(found["flat_kernel"]) >= 4
    assert ("mma.sync" in found["flat_kernel"].ptx) == (name != "float32")


@pytest.mark.parametrize("name", CASES)
def test_prefill_compiles_to_matrix_instructions(name: str, capability: int) -> None:
    found = kernels(capability, 2048, 4096, **CASES[name])
    assert set(found) == {"blocks_kernel"}
    assert wide_copies(found["blocks_kernel"]) >= 4
    assert ("wgmma.mma_async" in found["blocks_kernel"].ptx) == (name != "float32" and capability == 90)
    assert ("mma.sync" in found["blocks_kernel"].ptx) == (name != "float32" and capability == 80)


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("seq", [1, 2048])
def test_a_length_is_not_compiled_in(seq: int) -> None:
    from qwenopt.triton_kernels.paged_blocks import blocks_kernel
    from qwenopt.triton_kernels.paged_flat import flat_kernel

    kernel = flat_kernel if seq == 1 else blocks_kernel

    def variants() -> int:
        return len(kernel.device_caches[90][0])

    kernels(90, seq, 2049)
    before = variants()
    kernels(90, seq, 4000)
    assert variants() == before > 0
