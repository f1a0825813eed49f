"""paged_attention's kernels, interpreted, against the reference: decode, chunks, prefill and all of them together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenopt.ops.paged_attention import paged_attention as reference
from qwenopt.testing.interpreted import Run
from qwenopt.testing.ragged import Ragged
from qwenopt.testing.tolerance import assert_as_accurate

FEW, MANY = (2, 8), (16, 9)  # multiprocessors (few: prefill fills them) and major compute capability
HALF = torch.float16
DECODE = Ragged((37, 5, 130), (1, 1, 1))
MIXED = Ragged((70, 1, 37, 33, 64), (70, 1, 1, 0, 9), padding=3)
BATCH = Ragged((40, 40, 40), (5, 5, 5), packed=False)

CASES = {
    **{f"groups {h}/{g}": DECODE.but(heads=h, kv_heads=g) for h, g in ((4, 4), (4, 1), (10, 2), (8, 1), (16, 1))},
    **{f"page_size {p}": DECODE.but(page_size=p, dtype=HALF) for p in (16, 32, 64, 256, 24)},
    **{f"head_dim {d}": DECODE.but(head_dim=d, dtype=HALF) for d in (16, 72, 128, 256)},
    "head_dim 256 float32": DECODE.but(head_dim=256),
    "one row": Ragged((700,), (1,), dtype=HALF),
    "one row in many parts": Ragged((6000,), (1,), heads=8, kv_heads=1, dtype=HALF),
    "one long row among short": Ragged((900, 3, 1, 17, 60), (1, 1, 1, 1, 1), dtype=HALF),
    "several tokens each": Ragged((37, 5, 130), (3, 5, 2), heads=10),
    "no row": Ragged((5,), (0,), padding=2),
    "mixed": MIXED,
    "mixed float16": MIXED.but(dtype=HALF, page_size=64),
    "mixed groups of 5": MIXED.but(heads=10),
    "int8": DECODE.but(int8=True, dtype=HALF),
    "int8 float32": DECODE.but(int8=True, page_size=32),
    "int8 mixed": MIXED.but(int8=True, dtype=HALF),
    "window": DECODE.but(window=20),
    "window of one": DECODE.but(window=1),
    "window mixed": MIXED.but(window=33, dtype=HALF),
    "window over chunks": Ragged((200,), (150,), window=40, dtype=HALF),
    "batch": BATCH,
    "batch decode": BATCH.but(queries=(1, 1, 1), dtype=HALF),
    "batch prefill": Ragged((90, 90), (90, 90), packed=False, dtype=HALF),
    "batch window": BATCH.but(window=7),
}


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers in float64, but for the scales of int8, which are float32 by contract."""
    q, k, v, *rest = args
    return (q.double(), *(pool if pool.dtype == torch.int8 else pool.double() for pool in (k, v)), *rest)


def wanted(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The reference in its own dtype and in float64: NaNs that nobody sees may not reach a product there either."""
    q, k, v, *rest = args
    clean = tuple(pool.nan_to_num() for pool in (k, v))
    return reference(q, *clean, *rest), reference(*in_float64((q, *clean, *rest)))


def check(run: Run, args: tuple[Any, ...], device: tuple[int, int]) -> Tensor:
    found, after = run("paged_attention.planned_attention", device, *args)
    eager, truth = wanted(args)
    assert_as_accurate(found, eager, truth)
    assert found.transpose(1, 2).is_contiguous()
    for a, b in zip(args, after[1:], strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return found


@pytest.mark.parametrize("device", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_accurate_as_the_reference(run: Run, name: str, device: tuple[int, int]) -> None:
    check(run, CASES[name].build(), device)


def _mask(kind: str, args: tuple[Any, ...]) -> Tensor:
    num_keys = args[5].shape[1] * args[1].shape[2]
    batch, heads, seq, _ = args[0].shape
    if kind == "padding":
        return torch.arange(num_keys) >= 3 * torch.arange(batch)[:, None, None, None]
    if kind == "each head":
        return torch.rand(batch, heads, seq, num_keys) > 0.4
    if kind == "all hidden":
        return torch.zeros(1, 1, seq, num_keys, dtype=torch.bool)
    return torch.randn(batch, 1, seq, num_keys, dtype=args[0].dtype)


@pytest.mark.parametrize("device", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("kind", ["padding", "each head", "all hidden", "additive"])
@pytest.mark.parametrize("seq", [1, 40])
def test_masks_are_honoured(run: Run, kind: str, seq: int, device: tuple[int, int]) -> None:
    args = BATCH.but(queries=(seq,) * 3).build()
    check(run, (*args[:8], _mask(kind, args), *args[9:]), device)


@pytest.mark.parametrize("seq", [1, 40])
def test_a_mask_alone_says_what_is_seen(run: Run, seq: int) -> None:
    args = Ragged((48, 48), (seq, seq), packed=False).build()
    seen = torch.arange(args[5].shape[1] * 16) < torch.tensor([48, 31])[:, None, None, None]
    check(run, (*args[:7], None, seen, 5, args[10]), MANY)


def test_without_positions_and_mask_all_keys_are_seen(run: Run) -> None:
    args = Ragged((48, 48), (2, 2), packed=False).build()
    table = args[5][:, :3].contiguous()
    check(run, (*args[:5], table, None, None, None, 0, args[10]), MANY)


@pytest.mark.parametrize("device", [FEW, MANY], ids=["few", "many"])
def test_positions_may_come_in_any_order(run: Run, device: tuple[int, int]) -> None:
    args = list(MIXED.build())
    args[7] = args[7].clone()
    args[7][:70] = args[7][:70].flip(0)
    args[7][5], args[7][72] = -1, 10_000
    args[5][args[5] < 0] = 0
    args[1], args[2] = args[1].nan_to_num(), args[2].nan_to_num()
    check(run, tuple(args), device)
    check(run, (*args[:9], 20, args[10]), device)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("positions", [(3, 129), (129, 3)], ids=str)
def test_tokens_of_a_row_may_stand_far_apart(run: Run, positions: tuple[int, int], window: int) -> None:
    args = list(DECODE.but(queries=(1, 1, 2), window=window).build())
    args[7][2:] = torch.tensor(positions)
    check(run, tuple(args), FEW)
    check(run, tuple(args), MANY)


@pytest.mark.parametrize("batch", [DECODE, MIXED], ids=["decode", "mixed"])
def test_entries_behind_the_last_key_are_not_looked_at(run: Run, batch: Ragged) -> None:
    args = list(batch.build())
    found = run("paged_attention.planned_attention", MANY, *args)[0]
    args[5][args[5] < 0] = 1 << 30
    assert torch.equal(run("paged_attention.planned_attention", MANY, *args)[0], found)


def test_order_of_rows_changes_no_bit(run: Run) -> None:
    args = DECODE.build()
    found = run("paged_attention.planned_attention", MANY, *args)[0]
    order = torch.tensor([2, 0, 1])
    moved = (args[0][:, :, order], *args[1:5], args[5][order], args[6], args[7][order], *args[8:])
    assert torch.equal(run("paged_attention.planned_attention", MANY, *moved)[0], found[:, :, order])


def test_strided_queries_and_pools_are_read_where_they_lie(run: Run) -> None:
    q, k, v, *rest = DECODE.build()
    found = run("paged_attention.planned_attention", MANY, q, k, v, *rest)[0]
    both = torch.stack([k, v], dim=1)  # keys and values of a page side by side
    wide = torch.full((*q.shape[:3], 100), torch.nan)
    wide[..., : q.shape[3]] = q
    moved = (wide[..., : q.shape[3]], both[:, 0], both[:, 1], *rest)
    assert torch.equal(run("paged_attention.planned_attention", MANY, *moved)[0], found)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Ragged, tuple[int, int], int]:
    rows = draw(st.integers(1, 6))
    lengths = tuple(draw(st.integers(1, 90)) for _ in range(rows))
    queries = tuple(draw(st.sampled_from([0, 1, 1, 2, n])) if n > 1 else draw(st.integers(0, 1)) for n in lengths)
    group, kv_heads = draw(st.integers(1, 16)), draw(st.integers(1, 2))
    batch = Ragged(
        lengths,
        queries,
        heads=group * kv_heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([32, 64, 72])),
        page_size=draw(st.sampled_from([16, 32, 64])),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        int8=draw(st.booleans()),
        window=draw(st.sampled_from([0, 0, 1, 25])),
        padding=draw(st.sampled_from([0, 3])),
    )
    return batch, draw(st.sampled_from([FEW, MANY])), draw(st.integers(0, 99))


@settings(max_examples=40)
@given(batches())
def test_ragged_batches(run: Run, drawn: tuple[Ragged, tuple[int, int], int]) -> None:
    batch, device, seed = drawn
    args = batch.build(seed)
    if args[0].numel():
        found = check(run, args, device)
        assert not found[:, :, sum(batch.queries) :].any(), "tokens of no row give 0"
