"""Products of weights compiled for compute capability 8.0 and 9.0, with no GPU: loads, matrix instructions, limits."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from qwenopt.ops.triton.linear import planned_linear
from qwenopt.ops.triton.linear_group import planned_linear_group
from qwenopt.ops.triton.linear_silu_mul import planned_linear_silu_mul
from qwenopt.ops.triton.moe_experts import planned_experts
from qwenopt.testing.compiled import MAX_SHARED_BYTES, Kernel, assert_fits, compiled, wide_copies

BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32
MAX_SPILL_BYTES = 32  # a few of a thread's 255 registers
NUM_SMS = 132


def wide_loads(kernel: Kernel) -> int:
    """Loads of 16 bytes to registers."""
    return len(re.findall(r"ld\.global\.\S*v4\.b32", kernel.ptx))


def weight(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def linear(capability: int, rows: int, n: int, k: int, dtype: torch.dtype = BF16, bias: bool = False) -> list[Kernel]:
    x, b = weight(rows, k, dtype=dtype), weight(n, dtype=dtype) if bias else None
    found = compiled(capability, planned_linear, NUM_SMS, x, weight(n, k, dtype=dtype), b)
    for kernel in found:
        assert_fits(kernel, capability, MAX_SPILL_BYTES)
    return found


@pytest.mark.parametrize("dtype", [BF16, HALF, FP32], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (4096, 2560), (40000, 1024)])
def test_one_row_is_read_in_vectors(n: int, k: int, dtype: torch.dtype, capability: int) -> None:
    (kernel,) = linear(capability, 1, n, k, dtype, bias=n == 1024)
    assert kernel.name == "gemv_kernel"
    assert wide_loads(kernel) >= 4, "four rows a warp: as many loads before the first is needed"
    assert kernel.shared_bytes <= 2048


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (4096, 2560), (40000, 1024)])
def test_few_rows_are_multiplied_by_matrix_instructions(n: int, k: int, dtype: torch.dtype, capability: int) -> None:
    found = {kernel.name: kernel for kernel in linear(capability, 16, n, k, dtype, bias=n == 1024)}
    assert set(found) == ({"skinny_kernel", "combine_kernel"} if n == 1024 else {"skinny_kernel"})
    kernel = found["skinny_kernel"]
    # 16 rows are half of what wgmma multiplies at least; the reading is the work here, and mma.sync keeps up with it.
    assert "mma.sync" in kernel.ptx
    assert wide_copies(kernel) >= 16


def group(capability: int, rows: int, columns: tuple[int, ...], k: int, dtype: torch.dtype = BF16) -> Kernel:
    weights = [weight(n, k, dtype=dtype) for n in columns]
    (kernel,) = compiled(capability, planned_linear_group, NUM_SMS, weight(rows, k, dtype=dtype), weights)
    assert_fits(kernel, capability, MAX_SPILL_BYTES)
    return kernel


def gated(capability: int, rows: int, n: int, k: int, dtype: torch.dtype = BF16) -> Kernel:
    args = (weight(rows, k, dtype=dtype), weight(n, k, dtype=dtype), weight(n, k, dtype=dtype))
    (kernel,) = compiled(capability, planned_linear_silu_mul, NUM_SMS, *args)
    assert_fits(kernel, capability, MAX_SPILL_BYTES)
    return kernel


QKV = [(2048, 1024, 1024), (8192, 1024, 1024), (20000, 20000)]  # the last one for wide tiles


@pytest.mark.parametrize("dtype", [BF16, HALF, FP32], ids=str)
@pytest.mark.parametrize("columns", QKV, ids=str)
def test_a_group_of_one_row_is_read_in_vectors(columns: tuple[int, ...], dtype: torch.dtype, capability: int) -> None:
    kernel = group(capability, 1, columns, 1024, dtype)
    assert kernel.name == "group_gemv_kernel"
    assert wide_loads(kernel) >= 4, "as linear: that a weight is one of several must not hide how it is aligned"
    assert kernel.shared_bytes <= 2048


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
@pytest.mark.parametrize("columns", QKV, ids=str)
def test_a_group_of_few_rows_is_multiplied_by_matrix_instructions(
    columns: tuple[int, ...], dtype: torch.dtype, capability: int
) -> None:
    kernel = group(capability, 16, columns, 1024, dtype)
    assert kernel.name == "group_skinny_kernel"
    assert "mma.sync" in kernel.ptx
    alone = {one.name: one for one in linear(capability, 16, sum(columns), 1024, dtype)}["skinny_kernel"]
    assert wide_copies(kernel) >= wide_copies(alone), "as far ahead as linear reads"
    assert kernel.shared_bytes <= alone.shared_bytes, "the weights of its neighbours take none of a program's memory"


@pytest.mark.parametrize("dtype", [BF16, HALF, FP32], ids=str)
@pytest.mark.parametrize(("n", "k"), [(3072, 1024), (12288, 4096), (40000, 1024)])
def test_gate_and_up_of_one_row_are_read_in_vectors(n: int, k: int, dtype: torch.dtype, capability: int) -> None:
    kernel = gated(capability, 1, n, k, dtype)
    assert kernel.name == "gated_gemv_kernel"
    assert wide_loads(kernel) >= 4, "two rows of each for a warp: as many as linear has"
    assert kernel.shared_bytes <= 2048


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
@pytest.mark.parametrize(("n", "k"), [(3072, 1024), (12288, 4096), (40000, 1024)])
def test_gate_and_up_of_few_rows_are_multiplied_by_matrix_instructions(
    n: int, k: int, dtype: torch.dtype, capability: int
) -> None:
    kernel = gated(capability, 16, n, k, dtype)
    assert kernel.name == "gated_skinny_kernel"
    assert kernel.ptx.count("mma.sync") >= 2
    assert wide_copies(kernel) >= 16
    assert dtype != BF16 or len(re.findall(r"cvt\.rn\.bf16", kernel.ptx)) >= 4, "products, silu and result are rounded"


EXPERTS = {"30B-A3B": (128, 2048, 768), "235B-A22B": (128, 4096, 1536), "30B-A3B over 8": (128, 2048, 96)}  # E, N, I


def experts(capability: int, tokens: int, name: str = "30B-A3B", dtype: torch.dtype = BF16) -> dict[str, Kernel]:
    num_experts, hidden, inter = EXPERTS[name]
    x, ids, scores = weight(tokens, hidden, dtype=dtype), torch.empty(tokens, 8).long(), weight(tokens, 8, dtype=dtype)
    shapes = ((num_experts, 2 * inter, hidden), (num_experts, hidden, inter))
    weights = [weight(*shape, dtype=dtype) for shape in shapes]
    found = compiled(capability, planned_experts, capability // 10, x, ids, scores, *weights)
    return {kernel.name: kernel for kernel in found}


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", ["30B-A3B", "235B-A22B"])
def test_experts_of_a_few_tokens_are_read_in_vectors(name: str, dtype: torch.dtype, capability: int) -> None:
    found = experts(capability, 8, name, dtype)
    assert set(found) == {"decode_gate_up_kernel", "decode_down_kernel"}
    for kernel in found.values():
        assert_fits(kernel, capability, MAX_SPILL_BYTES)
        assert kernel.shared_bytes <= 2048
        assert wide_loads(kernel) >= 4
    # A wrong id stops the device, as in torch's own indexing.
    assert "__assertfail" in found["decode_down_kernel"].ptx
    assert "__assertfail" not in found["decode_gate_up_kernel"].ptx


SORTED = {"count_kernel", "place_kernel", "gate_up_kernel", "down_kernel", "combine_kernel"}


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096])
@pytest.mark.parametrize("name", ["30B-A3B", "30B-A3B over 8"])
def test_experts_are_multiplied_by_matrix_instructions(name: str, tokens: int, capability: int) -> None:
    found = experts(capability, tokens, name)
    assert set(found) == SORTED
    for kernel in found.values():
        large = tokens == 4096 and capability == 90  # one block of the largest tile has a multiprocessor for itself
        assert_fits(kernel, capability, MAX_SPILL_BYTES, {90: 227 * 1024} if large else MAX_SHARED_BYTES)
    assert "__assertfail" in found["combine_kernel"].ptx
    for product in ("gate_up_kernel", "down_kernel"):
        tall = tokens >= 1024
        assert ("wgmma.mma_async" in found[product].ptx) == (tall and capability == 90)
        assert ("mma.sync" in found[product].ptx) == (not tall or capability == 80)
        assert wide_copies(found[product]) >= 16
        assert "__assertfail" not in found[product].ptx


def test_float32_experts_compile(capability: int) -> None:
    found = experts(capability, 64, dtype=FP32)
    assert set(found) == SORTED
    for kernel in found.values():
        assert_fits(kernel, capability, MAX_SPILL_BYTES)
        assert "mma" not in kernel.ptx, "tensor cores would lose digits"


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("rows", [1, 3, 90])
def test_sizes_of_one_compile(rows: int) -> None:
    """The compiler takes an argument of 1 for a constant, which the interpreter does not."""
    if rows <= 16:
        assert compiled(90, planned_linear, NUM_SMS, weight(rows, 1), weight(1, 1), weight(1))
        assert compiled(90, planned_linear_group, NUM_SMS, weight(rows, 1), [weight(1, 1)] * 3)
        assert compiled(90, planned_linear_silu_mul, NUM_SMS, weight(rows, 1), weight(1, 1), weight(1, 1))
    x, ids, scores = weight(rows, 1), torch.empty(rows, 1).long(), weight(rows, 1)
    assert compiled(90, planned_experts, 9, x, ids, scores, weight(1, 2, 1), weight(1, 1, 1))
