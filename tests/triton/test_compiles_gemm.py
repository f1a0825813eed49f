"""Products of weights compiled for compute capability 8.0 and 9.0, with no GPU: loads, matrix instructions, limits."""

from __future__ import annotations

import os
import re

import pytest
import torch
from torch import Tensor

from qwenopt.ops.triton.linear import planned_linear
from qwenopt.testing.compiled import Kernel, compiled

CAPABILITIES = pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90"])
BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32
# What a block may have on the smallest device from 8.0 on (8.6, 8.9, 12.0); on 9.0, half of a multiprocessor.
MAX_SHARED_BYTES = {80: 99 * 1024, 90: 112 * 1024}
MAX_SPILL_BYTES = 32
NUM_SMS = 132


@pytest.fixture(autouse=True)
def compiles() -> None:
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("TRITON_INTERPRET is set: Triton compiles nothing in this process")


def assert_fits(kernel: Kernel, capability: int, shared_bytes: dict[int, int] = MAX_SHARED_BYTES) -> None:
    assert f".target sm_{'90a' if capability == 90 else capability}" in kernel.ptx
    assert kernel.shared_bytes <= shared_bytes[capability], (
        f"{kernel.name}: {kernel.shared_bytes} bytes of shared memory"
    )
    assert kernel.spill_bytes <= MAX_SPILL_BYTES, f"{kernel.name}: {kernel.spill_bytes} bytes spilled"


def wide_copies(kernel: Kernel) -> int:
    """Asynchronous copies of 16 bytes to shared memory."""
    return len(re.findall(r"cp\.async\.cg\.shared\.global [^;]*, 0x10", kernel.ptx))


def wide_loads(kernel: Kernel) -> int:
    """Loads of 16 bytes to registers."""
    return len(re.findall(r"ld\.global\.\S*v4\.b32", kernel.ptx))


def weight(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def linear(capability: int, rows: int, n: int, k: int, dtype: torch.dtype = BF16, bias: bool = False) -> list[Kernel]:
    x, b = weight(rows, k, dtype=dtype), weight(n, dtype=dtype) if bias else None
    found = compiled(capability, planned_linear, NUM_SMS, x, weight(n, k, dtype=dtype), b)
    for kernel in found:
        assert_fits(kernel, capability)
    return found


@CAPABILITIES
@pytest.mark.parametrize("dtype", [BF16, HALF, FP32], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (4096, 2560), (40000, 1024)])
def test_one_row_is_read_in_vectors(n: int, k: int, dtype: torch.dtype, capability: int) -> None:
    (kernel,) = linear(capability, 1, n, k, dtype, bias=n == 1024)
    assert kernel.name == "gemv_kernel"
    assert wide_loads(kernel) >= 4, "four rows a warp: as many loads before the first is needed"
    assert kernel.shared_bytes <= 2048


@CAPABILITIES
@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (4096, 2560), (40000, 1024)])
def test_few_rows_are_multiplied_by_matrix_instructions(n: int, k: int, dtype: torch.dtype, capability: int) -> None:
    found = {kernel.name: kernel for kernel in linear(capability, 16, n, k, dtype, bias=n == 1024)}
    assert set(found) == ({"skinny_kernel", "combine_kernel"} if n == 1024 else {"skinny_kernel"})
    kernel = found["skinny_kernel"]
    # 16 rows are half of what wgmma multiplies at least; the reading is the work here, and mma.sync keeps up with it.
    assert "mma.sync" in kernel.ptx
    assert wide_copies(kernel) >= 16
