"""Memory of a page pool: zeros that are there once they are touched, in large pages of the processor where it has them.

A pool's pages are read in an order that the allocator gives, so that with 4 KB pages of memory nearly every read waits
for a translation of its address. `bench/bench_pool_memory.py` measures the difference.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_BYTES = 4 << 20  # two large pages: below that there is nothing to be had


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros(shape)`; on a CPU under Linux, from 4 MB on, memory that asks for large pages (`madvise(2)`).

    Whether they are given is the kernel's affair (/sys/kernel/mm/transparent_hugepage/enabled); contents are the same.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if device.type != "cpu" or advice is None or num_bytes < LEAST_BYTES:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that was built without them
        memory.madvise(advice)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
