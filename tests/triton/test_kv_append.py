"""kv_append's kernel, interpreted: bit for bit what the reference writes, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenopt.ops.kv_append import kv_append as reference
from qwenopt.testing.interpreted import Run

# bfloat16 only as it comes: the interpreter does not round to it.
POOLS = [torch.float32, torch.float16, torch.int8]


def build(
    dtype: torch.dtype = torch.float32,
    pool: torch.dtype | None = None,
    *,
    batch: int = 2,
    seq: int = 3,
    kv_heads: int = 2,
    dim: int = 64,
    page_size: int = 16,
    num_pages: int = 5,
) -> tuple[Any, ...]:
    """The arguments of kv_append; pools hold 7 where nothing was written."""
    pool = pool or dtype
    shape = (num_pages, kv_heads, page_size, dim)
    pools = [torch.full(shape, 7, dtype=pool) for _ in range(2)]
    scales = [torch.full(shape[:3], 7.0) if pool == torch.int8 else None for _ in range(2)]
    k, v = (torch.randn(batch, seq, kv_heads, dim).to(dtype).transpose(1, 2) for _ in range(2))
    slots = torch.randperm(num_pages * page_size)[: batch * seq]
    return (*pools, *scales, k, v, slots)


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if a is None else a.clone() for a in args)


def check(run: Run, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as the reference leaves them; the kernel must leave them so, too."""
    expected = copied(args)
    reference(*expected)
    _, after = run("kv_append", *args)
    for found, wanted in zip(after, expected, strict=True):
        if isinstance(wanted, Tensor):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    return expected


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_writes_what_the_reference_writes(run: Run, dtype: torch.dtype, pool: torch.dtype) -> None:
    check(run, build(dtype, pool))


def test_bfloat16_goes_in_as_it_is(run: Run) -> None:
    check(run, build(torch.bfloat16))


@pytest.mark.parametrize("pool", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"kv_heads": 1},
        {"kv_heads": 3, "dim": 72},
        {"dim": 128, "page_size": 256, "num_pages": 2},
        {"batch": 1, "seq": 1, "page_size": 64},
        {"batch": 0},
    ],
    ids=str,
)
def test_sizes(run: Run, sizes: dict[str, int], pool: torch.dtype) -> None:
    check(run, build(torch.float16, pool, **sizes))


@pytest.mark.parametrize("pool", [torch.float32, torch.int8], ids=str)
def test_a_negative_slot_writes_nothing(run: Run, pool: torch.dtype) -> None:
    *rest, slots = build(pool=pool)
    slots[1], slots[4] = -1, -(1 << 40)
    check(run, (*rest, slots))


def test_a_slot_past_the_pool_writes_nothing(run: Run) -> None:
    *rest, slots = build()
    slots[2] = 5 * 16
    expected = copied((*rest, slots))
    expected[-1][2] = -1
    reference(*expected)
    after = run("kv_append", *rest, slots)[1]
    assert torch.equal(after[0], expected[0])
    assert torch.equal(after[1], expected[1])


def test_values_at_the_edge_of_a_code(run: Run) -> None:
    args = build(pool=torch.int8, dim=128)
    halves = torch.cat([torch.arange(-63.5, 64), torch.tensor([127.0])[:0]])
    args[4][..., :127], args[4][..., 127] = halves[:127], 127.0  # a scale of 1: every value is a tie
    args[5][:] = 0
    args[5][0, 0, 0, 0] = 1e-30
    expected = check(run, args)
    assert expected[0].unique().numel() > 60


def test_codes_where_one_division_would_round_otherwise(run: Run) -> None:
    """The largest of a row decides its factor: rows for which 127 / largest is not 127 times the reciprocal."""
    args = build(pool=torch.int8, batch=4, seq=16, num_pages=8)
    largest = 1 + torch.rand(4096)
    largest = largest[127 * largest.reciprocal() != (127 / largest.double()).float()][:64].view(4, 1, 16)
    for x in args[4:6]:
        # Values close to a tie, which fall to one side or the other by the last bit of the factor.
        x[:] = (torch.randint(-126, 126, x.shape) + 0.5) * (largest / 127)[..., None]
        x[..., 0] = largest
    check(run, args)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_the_scale(run: Run, bad: float) -> None:
    args = build(pool=torch.int8)
    args[4][1, 0, 2, 3] = bad
    page, place = divmod(int(args[6][5]), 16)
    after = run("kv_append", *args)[1]
    assert not after[2][page, 0, place].isfinite()
    assert after[2].isfinite().sum() == after[2].numel() - 1


@pytest.mark.parametrize("pool", [torch.float16, torch.int8], ids=str)
def test_keys_values_and_pools_may_lie_anyhow(run: Run, pool: torch.dtype) -> None:
    args = build(torch.float16, pool)
    both = torch.stack(args[:2], dim=1)
    moved = (both[:, 0], both[:, 1], *args[2:4], args[4].contiguous(), *args[5:])
    expected, after = copied(args), run("kv_append", *moved)[1]
    reference(*expected)
    assert torch.equal(after[0], expected[0])
    assert torch.equal(after[1], expected[1])


@settings(max_examples=40)
@given(st.data())
def test_random_tokens(run: Run, data: st.DataObject) -> None:
    pool = data.draw(st.sampled_from([torch.float32, torch.float16, torch.int8]))
    sizes = {
        "batch": data.draw(st.integers(1, 3)),
        "seq": data.draw(st.integers(1, 5)),
        "kv_heads": data.draw(st.sampled_from([1, 2, 4, 5])),
        "dim": data.draw(st.sampled_from([8, 64, 80])),
        "page_size": data.draw(st.sampled_from([16, 32, 24])),
    }
    torch.manual_seed(data.draw(st.integers(0, 999)))
    args = build(data.draw(st.sampled_from([torch.float32, torch.float16])), pool, **sizes)
    args[6][torch.rand(args[6].shape) < 0.2] = -1
    check(run, args)
