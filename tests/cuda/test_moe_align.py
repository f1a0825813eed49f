"""moe_align, emulated: every pair once, in its expert's blocks, in the order it came in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwenopt.ops.cuda import moe_align as kernels
from qwenopt.testing.emulated import Emulation


def check(emulation: Emulation, indices: Tensor, experts: int, block: int) -> None:
    assert kernels.accepts(indices, experts, block) is None
    found = emulation.call(kernels.moe_align, indices, experts, block)
    flat, none = indices.flatten().tolist(), indices.numel()
    pairs, owners, offsets = [], [], []
    for expert in range(experts):
        own = [pair for pair, e in enumerate(flat) if e == expert]
        count = -(-len(own) // block)
        offsets.append(len(pairs))
        pairs += own + [none] * (count * block - len(own))
        owners += [expert] * count
    rest = found.sorted.numel() - len(pairs)
    assert found.num_sorted.tolist() == [len(pairs)]
    assert found.offsets.tolist() == [*offsets, len(pairs)]
    assert found.sorted.tolist() == pairs + [none] * rest
    assert found.block_experts.tolist() == owners + [-1] * (rest // block)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(1, 8, 128), (5, 3, 7), (70, 8, 128), (150, 4, 5), (9, 2, 512), (33, 1, 1)]
)
def test_pairs_are_sorted(emulation: Emulation, tokens: int, top_k: int, experts: int, block: int) -> None:
    check(emulation, torch.randint(0, experts, (tokens, top_k)), experts, block)


def test_pairs_of_another_rank_are_left_out(emulation: Emulation) -> None:
    indices = torch.randint(0, 9, (40, 4))  # 8: not mine
    indices[3, 1], indices[7, 2], indices[8] = -1, 1 << 40, 8
    check(emulation, indices, 8, 4)


def test_all_for_one_expert_and_none_at_all(emulation: Emulation) -> None:
    check(emulation, torch.full((600, 1), 3), 6, 16)
    check(emulation, torch.full((4, 2), 6), 6, 16)
    check(emulation, torch.zeros(0, 2, dtype=torch.int64), 6, 16)


def test_the_capacity_is_never_too_small() -> None:
    for pairs in range(20):
        for experts in (1, 3, 8):
            for used in range(1, min(pairs, experts) + 1):
                counts = (pairs - used + 1, *[1] * (used - 1))  # one expert has all that the others do not need
                assert kernels.capacity(pairs, experts, 4) >= sum(-(-n // 4) * 4 for n in counts)


def test_what_the_kernel_has_not_is_named() -> None:
    indices = torch.zeros(2, 2, dtype=torch.int64)
    assert kernels.accepts(indices, 513, 16) == "513 experts in blocks of 16 (kernel: 1 to 512 experts)"
    assert kernels.accepts(indices.int(), 8, 16) == "indices torch.int32 (kernel: torch.int64)"
