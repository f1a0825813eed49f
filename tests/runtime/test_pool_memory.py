"""Memory of a page pool: the zeros of torch.zeros, in large pages where the kernel gives them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from qwenopt.runtime import pool_memory

CPU = torch.device("cpu")
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LARGE = (5, 3, 16, 64 * 1024)  # 15 MB of int8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 16, 8), LARGE, (0, 2, 16, 8)], ids=str)
def test_zeros_that_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pool = pool_memory.zeros(shape, dtype, CPU)
    assert (pool.shape, pool.dtype, pool.is_contiguous()) == (shape, dtype, True)
    assert not pool.any()
    pool.fill_(1)
    assert pool.sum(dtype=torch.float64) == pool.numel()


def test_a_copy_has_memory_of_its_own() -> None:
    pool = pool_memory.zeros(LARGE, torch.int8, CPU)
    other = copy.deepcopy(pool)
    other.fill_(1)
    assert not pool.any()


def test_another_device_has_its_own_memory() -> None:
    assert pool_memory.zeros(LARGE, torch.int8, torch.device("meta")).device.type == "meta"


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="this kernel gives no large pages")
def test_it_comes_in_large_pages() -> None:
    pool = pool_memory.zeros(LARGE, torch.int8, CPU).fill_(1)
    start, huge = pool.data_ptr(), 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in (head := line.split()[0]) and not line.startswith("Vm"):
            low, high = (int(end, 16) for end in head.split("-"))
            inside = low <= start < high
        elif inside and line.startswith("AnonHugePages:"):
            huge += int(line.split()[1]) << 10
    assert huge >= pool.nbytes // 2  # where memory is in small pieces some are refused; unasked there is none
