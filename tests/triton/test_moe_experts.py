"""moe_experts' kernels, interpreted, against float64, and which of them run for which shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenopt.ops.moe_experts import moe_experts as reference
from qwenopt.testing.cases import Case, cases
from qwenopt.testing.formulas import FORMULAS
from qwenopt.testing.interpreted import Run
from qwenopt.testing.tolerance import assert_as_accurate

if not pytest.importorskip("triton", reason="triton is not installed (pip install triton)"):
    raise AssertionError

from qwenopt.triton_kernels.moe_experts import FLOAT32, LARGE, LARGE_HOPPER, TILES, Tile, plan, workspace

HALF, FP32 = torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [HALF, FP32], ids=str)
AMPERE, HOPPER = 8, 9
DECODE, MANY = 4, 40  # tokens, with 2 of 16 experts each


def build(
    tokens: int, experts: int = 16, top_k: int = 2, hidden: int = 64, inter: int = 48, dtype: torch.dtype = HALF
) -> tuple[Any, ...]:
    indices = torch.rand(tokens, experts).argsort(-1)[:, :top_k].contiguous()
    gate_up = torch.randn(experts, 2 * inter, hidden) * hidden**-0.5
    down = torch.randn(experts, hidden, inter) * inter**-0.5
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, top_k)
    return x.to(dtype), indices, weights.to(dtype), gate_up.to(dtype), down.to(dtype)


def check(run: Run, args: tuple[Any, ...], major: int = AMPERE) -> Tensor:
    found, after = run("moe_experts.planned_experts", major, *args)
    assert_as_accurate(found, reference(*args), FORMULAS["moe_experts"](*args))
    for a, b in zip(args, after[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return found


@DTYPES
@pytest.mark.parametrize("case", cases("moe_experts"), ids=str)
def test_the_cases_of_all_providers(run: Run, case: Case, dtype: torch.dtype) -> None:
    check(run, case.build(dtype))


@pytest.mark.parametrize(
    ("rows", "major", "tile"),
    [(4, 8, TILES[8]), (20, 8, TILES[24]), (60, 9, TILES[96]), (98, 8, LARGE), (98, 9, LARGE_HOPPER)],
)
def test_every_tile(run: Run, rows: int, major: int, tile: Tile) -> None:
    tokens = rows * 3 // 2
    assert plan(tokens, 2, 3, 2, major).tile == tile
    check(run, build(tokens, 3, hidden=72, inter=72), major)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize(("hidden", "inter"), [(256, 256), (320, 264), (40, 520), (37, 11)])
def test_sizes(run: Run, hidden: int, inter: int, tokens: int) -> None:
    check(run, build(tokens, 4, hidden=hidden, inter=inter))


@pytest.mark.parametrize("tokens", [1, 3, 30])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 3), (8, 8), (96, 5)])
def test_numbers_of_experts(run: Run, experts: int, top_k: int, tokens: int) -> None:
    check(run, build(tokens, experts, top_k, 32, 16))


@DTYPES
@pytest.mark.parametrize("tokens", [DECODE, MANY])
def test_pairs_of_other_ranks_add_nothing(run: Run, tokens: int, dtype: torch.dtype) -> None:
    x, indices, weights, *experts = build(tokens, dtype=dtype)
    indices[1], indices[2, 0] = 16, 16
    weights[1], weights[2, 0] = torch.nan, torch.inf  # nobody looks
    found = run("moe_experts.planned_experts", AMPERE, x, indices, weights, *experts)[0]
    clean = weights.nan_to_num(posinf=0)
    assert torch.equal(found, check(run, (x, indices, clean, *experts)))
    assert not found[1].any()


@pytest.mark.parametrize("tokens", [DECODE, MANY])
def test_no_pair_at_all(run: Run, tokens: int) -> None:
    x, indices, *rest = build(tokens)
    assert not check(run, (x, torch.full_like(indices, 16), *rest)).any()


@pytest.mark.parametrize("bad", [-1, 17, 1 << 40])
@pytest.mark.parametrize("tokens", [DECODE, MANY])
def test_a_wrong_id_reads_nothing_foreign(run: Run, tokens: int, bad: int) -> None:
    """On a GPU the kernel asserts (`test_compiles_gemm`); interpreted, it goes on, as if the id were another rank's."""
    x, indices, *rest = build(tokens)
    indices[-1, 1] = 16
    expected = run("moe_experts.planned_experts", AMPERE, x, indices, *rest)[0]
    indices[-1, 1] = bad
    assert torch.equal(run("moe_experts.planned_experts", AMPERE, x, indices, *rest)[0], expected)


@pytest.mark.parametrize("tokens", [DECODE, 140])
def test_one_expert_may_have_all_tokens(run: Run, tokens: int) -> None:
    x, indices, *rest = build(tokens, 16, 1)
    check(run, (x, torch.full_like(indices, 15), *rest))


def test_a_sort_of_several_runs_for_each_program(run: Run) -> None:
    x, indices, *rest = build(520, 16, 16, 16, 16)
    assert plan(520, 16, 16, 2, AMPERE).num_pairs > 64 * 128
    args = (x, torch.randint(0, 17, indices.shape), *rest)
    found = run("moe_experts.planned_experts", AMPERE, *args)[0]
    assert_as_accurate(found, reference(*args), reference(*(a.double() if a.is_floating_point() else a for a in args)))


@pytest.mark.parametrize("tokens", [DECODE, MANY])
def test_order_of_tokens_changes_no_bit(run: Run, tokens: int) -> None:
    x, indices, weights, *experts = build(tokens)
    order = torch.randperm(tokens)
    found = run("moe_experts.planned_experts", AMPERE, x, indices, weights, *experts)[0]
    moved = run("moe_experts.planned_experts", AMPERE, x[order], indices[order], weights[order], *experts)[0]
    assert torch.equal(moved, found[order])


@pytest.mark.parametrize("tokens", [DECODE, MANY])
def test_everything_is_read_where_it_lies(run: Run, tokens: int) -> None:
    x, indices, weights, gate_up, down = args = build(tokens)
    found = run("moe_experts.planned_experts", AMPERE, *args)[0]
    wide = torch.full((tokens, 80), torch.nan, dtype=HALF)
    wide[:, :64] = x
    both = torch.full((16, 100, 70), torch.nan, dtype=HALF)
    both[:, :96, :64] = gate_up
    tall = torch.full((16, 70, 50), torch.nan, dtype=HALF)
    tall[:, :64, :48] = down
    moved = (wide[:, :64], indices.t().contiguous().t(), weights.t().contiguous().t(), both[:, :96, :64])
    assert torch.equal(run("moe_experts.planned_experts", AMPERE, *moved, tall[:, :64, :48])[0], found)
    moved = (x.t().contiguous().t(), indices, weights, gate_up, down)
    assert torch.equal(run("moe_experts.planned_experts", AMPERE, *moved)[0], found)


@settings(max_examples=12)
@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 5), st.sampled_from([8, 37, 64]), st.booleans())
def test_random_batches(run: Run, tokens: int, experts: int, top_k: int, hidden: int, half: bool) -> None:
    torch.manual_seed(tokens)
    args = build(tokens, experts, min(top_k, experts), hidden, 24, HALF if half else FP32)
    args[1][torch.rand(args[1].shape) < 0.1] = experts
    check(run, args)


def planned(tokens: int, itemsize: int = 2, major: int = HOPPER) -> Tile | None:
    """The tile for Qwen3-30B-A3B."""
    return plan(tokens, 8, 128, itemsize, major).tile


@pytest.mark.parametrize(
    ("tokens", "tile"),
    [(1, None), (8, None), (9, TILES[8]), (128, TILES[8]), (256, TILES[24]), (1024, TILES[96]), (4096, LARGE_HOPPER)],
)
def test_tiles_follow_the_rows_of_an_expert(tokens: int, tile: Tile | None) -> None:
    assert planned(tokens) == tile


def test_other_tiles() -> None:
    assert planned(4096, major=AMPERE) == LARGE
    assert planned(4096, itemsize=4) == FLOAT32
    assert plan(1, 2, 2, 2, HOPPER).tile is None, "one token has each expert once"
    assert plan(8, 2, 8, 2, HOPPER).tile is not None, "8 experts for 16 pairs: their weights would be read twice"


@settings(max_examples=200)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.sampled_from([HOPPER, AMPERE]))
def test_blocks_suffice_whatever_the_ids(counts: list[int], major: int) -> None:
    p = plan(sum(counts), 1, len(counts), 2, major)
    if p.tile is not None:
        assert sum(-(-count // p.tile.block_m) for count in counts) <= p.num_blocks


def test_workspace() -> None:
    assert workspace(plan(8, 8, 128, 2, HOPPER), 2048, 768, 128) == (64 * 768, 0, 0)
    p = plan(64, 8, 128, 2, HOPPER)
    assert (p.num_programs, p.num_blocks) == (4, 152)
    assert workspace(p, 2048, 768, 128) == (512 * 768, 512 * 2048, 512 + 4 * 256 + 1 + 3 * 152)
