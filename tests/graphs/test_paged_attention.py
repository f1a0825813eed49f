"""paged_attention, kv_append: raised where keys are gathered from pages and it is proven what a query sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops import KV_APPEND, KV_GATHER, KV_RESERVE, PAGED_MASK
from qwenopt.ops.kv_reserve import HANDLES
from qwenopt.testing.capture import Captured, capture

PAGES, GROUPS, HEADS, SIZE, DIM, ROWS, WIDTH = 12, 2, 4, 4, 16, 2, 3
LENGTH = WIDTH * SIZE
STARTS = torch.tensor([0, 1, 4], dtype=torch.int32)
POSITIONS = torch.tensor([6, 3, 4, 5])


def pools() -> tuple[Tensor, Tensor]:
    return torch.randn(PAGES, GROUPS, SIZE, DIM), torch.randn(PAGES, GROUPS, SIZE, DIM)


def table() -> Tensor:
    return torch.randperm(PAGES)[: ROWS * WIDTH].view(ROWS, WIDTH).int()


def repeat(x: Tensor) -> Tensor:
    batch, groups, length, dim = x.shape
    times = HEADS // GROUPS
    return x[:, :, None, :, :].expand(batch, groups, times, length, dim).reshape(batch, groups * times, length, dim)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **how: Any) -> Tensor:
    out = F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask, scale=DIM**-0.5, **how)
    return out.transpose(1, 2).contiguous()


def check(fn: Callable[..., Any], *args: Tensor, raised: dict[str, int]) -> Captured:
    wanted = fn(*[a.clone() for a in args])
    captured = capture(fn, *args)
    torch.testing.assert_close(captured.result, wanted, rtol=1e-6, atol=1e-6)
    assert captured.counts == raised, captured.reasons
    return captured


def packed(q: Tensor, k_pool: Tensor, v_pool: Tensor, blocks: Tensor, starts: Tensor, positions: Tensor) -> Tensor:
    k, v = KV_GATHER.default(k_pool, v_pool, None, None, blocks, True, q.dtype)
    return attend(q, k, v, PAGED_MASK.default(starts, positions, LENGTH, 0))


def in_batch(mask: Callable[[Tensor], Tensor | None], **how: Any) -> Callable[..., Tensor]:
    def fn(q: Tensor, k_pool: Tensor, v_pool: Tensor, blocks: Tensor, positions: Tensor) -> Tensor:
        k, v = KV_GATHER.default(k_pool, v_pool, None, None, blocks, False, q.dtype)
        return attend(q, k, v, mask(positions), **how)

    return fn


def batch_args() -> tuple[Tensor, ...]:
    return torch.randn(ROWS, HEADS, 4, DIM), *pools(), table(), torch.arange(3, 7)


def causal(positions: Tensor) -> Tensor:
    return torch.arange(LENGTH)[None, None, None, :] <= positions[None, None, :, None]


def test_packed_rows_are_told_apart_by_their_starts() -> None:
    captured = check(
        packed,
        torch.randn(1, HEADS, 4, DIM),
        *pools(),
        table(),
        STARTS,
        POSITIONS,
        raised={"paged_attention": 1},
    )
    q_starts, positions, mask, window = captured.call("paged_attention")[6:10]
    assert q_starts is not None
    assert positions is not None
    assert mask is None
    assert window == 0
    assert not [n for n in captured.contexts[0].graph.nodes if n.target in (KV_GATHER.default, PAGED_MASK.default)]


def test_a_window_comes_from_the_mask() -> None:
    def fn(q: Tensor, k_pool: Tensor, v_pool: Tensor, blocks: Tensor, starts: Tensor, positions: Tensor) -> Tensor:
        k, v = KV_GATHER.default(k_pool, v_pool, None, None, blocks, True, q.dtype)
        return attend(q, k, v, PAGED_MASK.default(starts, positions, LENGTH, 3))

    args = (torch.randn(1, HEADS, 4, DIM), *pools(), table(), STARTS, POSITIONS)
    assert check(fn, *args, raised={"paged_attention": 1}).call("paged_attention")[9] == 3


def test_a_proven_causal_mask_becomes_positions() -> None:
    captured = check(in_batch(causal), *batch_args(), raised={"paged_attention": 1})
    positions, mask = captured.call("paged_attention")[7:9]
    assert positions is not None
    assert mask is None


def test_any_other_mask_is_honoured() -> None:
    def other(positions: Tensor) -> Tensor:
        return (torch.arange(LENGTH)[None, None, None, :] % 3 != 1) & (positions[None, None, :, None] > 0)

    positions, mask = check(in_batch(other), *batch_args(), raised={"paged_attention": 1}).call("paged_attention")[7:9]
    assert positions is None
    assert mask is not None


def test_a_write_before_the_gather_is_seen() -> None:
    def fn(q: Tensor, k_pool: Tensor, v_pool: Tensor, blocks: Tensor, positions: Tensor, new: Tensor) -> Tensor:
        KV_APPEND.default(k_pool, v_pool, None, None, new, new, torch.arange(8))
        k, v = KV_GATHER.default(k_pool, v_pool, None, None, blocks, False, q.dtype)
        return attend(q, k, v, causal(positions))

    check(fn, *batch_args(), torch.randn(ROWS, GROUPS, 4, DIM), raised={"paged_attention": 1, "kv_append": 1})


def test_a_write_between_gather_and_attention_is_not_moved_over() -> None:
    def fn(q: Tensor, k_pool: Tensor, v_pool: Tensor, blocks: Tensor, positions: Tensor, new: Tensor) -> Tensor:
        k, v = KV_GATHER.default(k_pool, v_pool, None, None, blocks, False, q.dtype)
        KV_APPEND.default(k_pool, v_pool, None, None, new, new, torch.arange(8))
        return attend(q, k, v, causal(positions))

    check(fn, *batch_args(), torch.randn(ROWS, GROUPS, 4, DIM), raised={"attention": 1, "kv_append": 1})


def swapped(q: Tensor, k_pool: Tensor, v_pool: Tensor, blocks: Tensor, positions: Tensor) -> Tensor:
    k, v = KV_GATHER.default(k_pool, v_pool, None, None, blocks, False, q.dtype)
    return attend(q, v, k, causal(positions))


def read_twice(q: Tensor, k_pool: Tensor, v_pool: Tensor, blocks: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    k, v = KV_GATHER.default(k_pool, v_pool, None, None, blocks, False, q.dtype)
    return attend(q, k, v, causal(positions)), k


def changed(q: Tensor, k_pool: Tensor, v_pool: Tensor, blocks: Tensor, positions: Tensor) -> Tensor:
    k, v = KV_GATHER.default(k_pool, v_pool, None, None, blocks, False, q.dtype)
    return attend(q, k * 2, v, causal(positions))


def two_gathers(q: Tensor, k_pool: Tensor, v_pool: Tensor, blocks: Tensor, positions: Tensor) -> Tensor:
    k, _ = KV_GATHER.default(k_pool, v_pool, None, None, blocks, False, q.dtype)
    _, v = KV_GATHER.default(v_pool, k_pool, None, None, blocks, False, q.dtype)
    return attend(q, k, v, causal(positions))


NEAR_MISSES: dict[str, Callable[..., Any]] = {
    "keys and values exchanged": swapped,
    "keys are read by somebody else": read_twice,
    "keys are changed": changed,
    "of two gathers": two_gathers,
    "no mask": in_batch(lambda positions: None),
    "is_causal": in_batch(lambda positions: None, is_causal=True),
}


@pytest.mark.parametrize("what", NEAR_MISSES)
def test_near_misses_keep_the_gather(what: str) -> None:
    check(NEAR_MISSES[what], *batch_args(), raised={"attention": 1})


def test_packed_rows_under_another_mask_keep_the_gather() -> None:
    def fn(q: Tensor, k_pool: Tensor, v_pool: Tensor, blocks: Tensor, mask: Tensor) -> Tensor:
        k, v = KV_GATHER.default(k_pool, v_pool, None, None, blocks, True, q.dtype)
        return attend(q, k, v, mask)

    mask = torch.rand(1, 1, 4, ROWS * LENGTH) > 0.3
    check(fn, torch.randn(1, HEADS, 4, DIM), *pools(), table(), mask, raised={"attention": 1})


def test_disabled_ops_are_left_alone() -> None:
    args = (torch.randn(1, HEADS, 4, DIM), *pools(), table(), STARTS, POSITIONS)
    assert capture(packed, *args, disable=("paged_attention",)).counts == {"attention": 1}


def reserving(q: Tensor, length: Tensor, blocks: Tensor, slots: Tensor, handle: Tensor) -> tuple[Tensor, Tensor]:
    before = length + 1
    x = q.sin().cos()
    KV_RESERVE.default(handle, blocks, length, slots, 1, 2)
    return x + before, slots[:2] * 2


def test_reserving_moves_up_to_the_last_reader_and_no_further() -> None:
    class Reserver:
        def reserve_batch(self, batch: int, seq: int, block_table: Tensor, length: Tensor, slots: Tensor) -> None:
            length.add_(seq)
            slots[: batch * seq] = 7

    reserver = Reserver()
    args = (torch.randn(3), torch.zeros((), dtype=torch.int64), table(), torch.zeros(9, dtype=torch.int64))
    captured = capture(reserving, *args, torch.tensor(HANDLES.new(reserver)))
    assert captured.result[1].tolist() == [14, 14]
    assert torch.equal(captured.result[0], args[0].sin().cos() + 1)
    names = [n.name for n in captured.contexts[0].graph.nodes if n.op.startswith("call")]
    order = [names.index(name) for name in ("before", next(n for n in names if n.startswith("kv_reserve")), "sin")]
    assert order == sorted(order), names
