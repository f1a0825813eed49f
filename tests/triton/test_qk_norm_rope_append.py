"""qk_norm_rope_append's kernel, interpreted: bit for bit what qk_norm_rope and kv_append do one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops import QK_NORM_ROPE_APPEND, QK_NORM_ROPE_STATIC_APPEND
from qwenopt.testing.cases import case
from qwenopt.testing.interpreted import Run

HALF, FP32 = torch.float16, torch.float32
NAMES = ("decode", "prefill", "tables of each row", "head_dim 72", "head_dim 2", "head_dim 256")


def build(name: str, dtype: torch.dtype, coded: bool = False, page_size: int = 16) -> tuple[list[Any], list[Any]]:
    """The rotation's arguments, and pools that hold -9 with values and slots; one token is not to be kept."""
    rope = list(case("qk_norm_rope", name).build(dtype))
    batch, seq, groups, dim = rope[1].shape
    shape = (96 // page_size, groups, page_size, dim)
    pools = [torch.full(shape, -9).to(torch.int8 if coded else dtype) for _ in range(2)]
    scales = [torch.full(shape[:3], -9.0) if coded else None for _ in range(2)]
    v = torch.randn(batch, seq, groups, dim).to(dtype).transpose(1, 2)
    slots = torch.randperm(96)[: batch * seq]
    if len(slots) > 1:
        slots[len(slots) // 2] = -1
    return rope, [*pools, *scales, v, slots]


def check(run: Run, rope: list[Any], rest: list[Any]) -> list[Tensor]:
    """What the pools hold afterwards."""
    found, after = run("qk_norm_rope_append", *rope, *rest)
    (queries, keys), _ = run("qk_norm_rope", *rope)
    _, apart = run("kv_append", *rest[:4], keys, *rest[4:])
    torch.testing.assert_close(found, queries, rtol=0, atol=0, equal_nan=True)
    assert found.stride() == queries.stride()
    for one, same in zip(after[7:11], apart[:4], strict=True):
        if same is not None:
            torch.testing.assert_close(one, same, rtol=0, atol=0, equal_nan=True)
    return [t for t in after[7:11] if t is not None]


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("dtype", [FP32, HALF], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_as_apart(run: Run, name: str, dtype: torch.dtype, coded: bool) -> None:
    pools = check(run, *build(name, dtype, coded))
    assert all((pool != -9).any() for pool in pools)


@pytest.mark.parametrize("page_size", [4, 32, 96])
def test_page_sizes(run: Run, page_size: int) -> None:
    check(run, *build("prefill", HALF, page_size=page_size))


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "int8"])
def test_several_heads_in_a_program(run: Run, coded: bool) -> None:
    q, k = torch.randn(2, 35, 5, 8), torch.randn(2, 35, 3, 8)
    tables = [torch.randn(2, 35, 8) for _ in range(2)]
    pools = [torch.zeros(5, 3, 16, 8, dtype=torch.int8 if coded else FP32) for _ in range(2)]
    scales = [torch.zeros(5, 3, 16) if coded else None for _ in range(2)]
    v, slots = torch.randn(2, 35, 3, 8).transpose(1, 2), torch.randperm(80)[:70]
    check(run, [q, k, torch.rand(8), torch.rand(8), *tables, 1e-6], [*pools, *scales, v, slots])


def test_layouts_that_graphs_hand_over(run: Run) -> None:
    """Heads of one projection, values that are columns of it, tables whose rows are apart, pools of one tensor."""
    rope, rest = build("prefill", HALF)
    q, k, *weights, cos, sin, eps = rope
    h, g, v = q.shape[2], k.shape[2], rest[4].transpose(1, 2)
    packed = torch.cat((q, k, v), 2)
    tables = torch.stack((cos, sin), 2)
    both = torch.stack(rest[:2], 2)
    moved_rope = [packed[:, :, :h], packed[:, :, h : h + g], *weights, tables[:, :, 0], tables[:, :, 1], eps]
    moved = [both[:, :, 0], both[:, :, 1], None, None, packed[:, :, h + g :].transpose(1, 2), rest[5]]
    assert QK_NORM_ROPE_APPEND.providers[0].accepts(*moved_rope, *moved) is None
    for one, same in zip(check(run, moved_rope, moved), check(run, rope, rest), strict=True):
        assert torch.equal(one, same)


@pytest.mark.parametrize("at", [3, 40], ids=["first half", "second half"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_codes_of_what_is_no_number(run: Run, bad: float, at: int) -> None:
    """The scale says so, whichever half it is in."""
    rope, rest = build("prefill", FP32, coded=True)
    rest[4][0, 1, 2, at] = bad
    rest[5].copy_(torch.arange(len(rest[5])))
    _, after = run("qk_norm_rope_append", *rope, *rest)
    assert after[10][0, 1, 2].isnan() or after[10][0, 1, 2].isinf()


def test_slots_outside_of_the_pool_are_not_written(run: Run) -> None:
    rope, rest = build("decode", FP32)
    for slot in (-1, 96, 10**12):
        rest[5].fill_(slot)
        found, after = run("qk_norm_rope_append", *rope, *rest)
        assert all((pool == -9).all() for pool in after[7:9])
        assert torch.equal(found, run("qk_norm_rope", *rope)[0][0])


STATIC = ("decode", "prefill", "tables of each row", "head_dim 72")


def static(name: str, dtype: torch.dtype, length: int, places: int = 40) -> tuple[list[Any], list[Any]]:
    """The rotation's arguments; a cache of -9, values, and its length."""
    rope = list(case("qk_norm_rope", name).build(dtype))
    batch, seq, groups, dim = rope[1].shape
    cache = [torch.full((batch, groups, places, dim), -9).to(dtype) for _ in range(2)]
    return rope, [*cache, torch.randn(batch, seq, groups, dim).to(dtype).transpose(1, 2), torch.tensor(length)]


@pytest.mark.parametrize("length", [0, 5, 33])
@pytest.mark.parametrize("dtype", [FP32, HALF], ids=str)
@pytest.mark.parametrize("name", STATIC)
def test_a_static_cache(run: Run, name: str, dtype: torch.dtype, length: int) -> None:
    """The same as the rotation alone and two copies; the length stays, the graph counts it on."""
    rope, (keys, values, v, at) = static(name, dtype, length)
    found, after = run("qk_norm_rope_static_append", *rope, keys, values, v, at)
    (queries, rotated), _ = run("qk_norm_rope", *rope)
    places = torch.arange(length, length + v.shape[2])
    assert torch.equal(found, queries)
    assert torch.equal(after[7], keys.index_copy_(2, places, rotated))
    assert torch.equal(after[8], values.index_copy_(2, places, v))
    assert after[10] == length


def test_a_static_cache_of_other_strides(run: Run) -> None:
    """Keys and values of one tensor, rows of which lie apart."""
    rope, (keys, values, v, at) = static("prefill", HALF, 7)
    both = torch.stack((keys, values), 3)
    moved = [both[:, :, :, 0], both[:, :, :, 1]]
    assert QK_NORM_ROPE_STATIC_APPEND.providers[0].accepts(*rope, *moved, v, at) is None
    _, plain = run("qk_norm_rope_static_append", *rope, keys, values, v, at)
    _, after = run("qk_norm_rope_static_append", *rope, *moved, v, at)
    assert torch.equal(after[7], plain[7])
    assert torch.equal(after[8], plain[8])


@pytest.mark.parametrize("length", [40, 10**12, -1])
def test_nothing_is_written_beside_a_static_cache(run: Run, length: int) -> None:
    """On a GPU the kernel asserts (`test_compiles_small`); interpreted, it goes on."""
    rope, rest = static("decode", FP32, length)
    _, after = run("qk_norm_rope_static_append", *rope, *rest)
    assert all((cache == -9).all() for cache in after[7:9])


def test_what_is_not_for_the_kernel() -> None:
    rope, rest = build("prefill", HALF)
    accepts = QK_NORM_ROPE_APPEND.providers[0].accepts
    assert accepts(*rope, *rest) is None
    assert "mixed dtypes" in str(accepts(rope[0].float(), *rope[1:], *rest))
    assert "k_pool has dtype torch.float64" in str(accepts(*rope, rest[0].double(), *rest[1:]))
