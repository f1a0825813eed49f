"""The (token, choice) pairs of a mixture of experts, sorted by expert on the GPU in blocks for a grouped product."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qwenopt.ops import cpu
from qwenopt.ops.cuda.launch import Launch, Run, pack

THREADS = 512
MAX_EXPERTS = 512


class Aligned(NamedTuple):
    """Pairs in blocks of one expert each.

    sorted int32 [capacity]: pair numbers `token * K + choice`, and T * K where a block is filled up; block_experts
    int32 [capacity / block], -1 behind the last block; num_sorted int32 [1], what of `sorted` is used; offsets int32
    [E + 1], where each expert begins. The capacity follows from the shapes alone: nothing is read back.
    """

    sorted: Tensor
    block_experts: Tensor
    num_sorted: Tensor
    offsets: Tensor


def accepts(indices: Tensor, num_experts: int, block: int) -> str | None:
    if indices.dtype != torch.int64:
        return f"indices {indices.dtype} (kernel: torch.int64)"
    if not (0 < num_experts <= MAX_EXPERTS and block > 0):
        return f"{num_experts} experts in blocks of {block} (kernel: 1 to {MAX_EXPERTS} experts)"
    return cpu.contiguous(indices=indices)


def capacity(pairs: int, num_experts: int, block: int) -> int:
    """The most places that so many pairs take: each expert that has one wastes less than a block."""
    used = min(pairs, num_experts)
    return -(-(pairs + used * (block - 1)) // block) * block


def moe_align(run: Run, indices: Tensor, num_experts: int, block: int) -> Aligned:
    """Sort the pairs of `indices` int64 [T, K] (ids 0..E; E and what is no expert is left out), stably."""
    size = capacity(indices.numel(), num_experts, block)

    def empty(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int32, device=indices.device)

    made = Aligned(empty(size), empty(size // block), empty(1), empty(num_experts + 1))
    args = pack(indices, *made, indices.numel(), num_experts, block, size)
    run(Launch("moe_align", (1, 1, 1), THREADS, args))
    return made
