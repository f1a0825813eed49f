"""moe_experts in Triton: which kernels run for which shapes, with which tiles, and their launches.

A few tokens run as vectors (`moe_decode`), more as blocks of rows of one expert (`moe_sort`, `moe_gemm`), the taller
the more rows an expert has on average. The choice depends on shapes alone, every grid is an upper bound and nothing is
read back, so a CUDA graph that recorded a call serves any ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
from torch import Tensor

from qwenopt.triton_kernels import moe_sort
from qwenopt.triton_kernels.moe_decode import decode_down_kernel, decode_gate_up_kernel
from qwenopt.triton_kernels.moe_gemm import combine_kernel, down_kernel, gate_up_kernel


@dataclass(frozen=True)
class Tile:
    """Rows, columns and inner dimension of a tile, and how the compiler is to spread them."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Rows of an expert on average, up to which a tile is taken -> the tile; the last one for any more. At most 99 KB of
# shared memory, which every GPU from compute capability 8.0 on has, but for Hopper's largest. Not tuned on a device:
# the heights at which the tables that others tuned on H100 and H200 agree. float32, which is multiplied without tensor
# cores, is there to be exact.
TILES = {8: Tile(16, 128, 64, 4, 4), 24: Tile(32, 128, 64, 4, 4), 96: Tile(64, 128, 64, 4, 3)}
LARGE, LARGE_HOPPER = Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 4)
FLOAT32 = Tile(16, 64, 16, 4, 2)
# Each warp of the vector kernels reads 256 elements of 4 rows at once, of gate and up or of several experts.
DECODE_COLS, DECODE_INNER = {"gate_up": 8, "down": 2}, 256
COMBINE_COLS = 512


@dataclass(frozen=True)
class Plan:
    """What a call launches: `tile` None, the vector kernels; else the sort's programs and the bound of blocks."""

    num_pairs: int
    tile: Tile | None
    num_programs: int
    num_blocks: int


class Sizes(NamedTuple):
    """How much a call needs for itself: elements of x's dtype behind gate and up and behind down, int32."""

    hidden: int
    rows: int
    ints: int


def plan(num_tokens: int, top_k: int, num_experts: int, itemsize: int, major: int) -> Plan:
    """The launches for so many tokens in `top_k` of `num_experts` experts each, on compute capability `major`."""
    num_pairs = num_tokens * top_k
    # Pairs that share an expert read its weights once each, from L2 but for the first. With one pair for two experts
    # that is a quarter more than the weights once, which L2 has to spare; from there on it would bound the time.
    if num_pairs <= max(top_k, num_experts // 2):
        return Plan(num_pairs, None, 0, 0)
    average = num_pairs / num_experts
    large = LARGE_HOPPER if major == 9 else LARGE
    tile = FLOAT32 if itemsize == 4 else next((tile for most, tile in TILES.items() if average <= most), large)
    occupied = min(num_experts, num_pairs)
    num_blocks = (num_pairs + occupied * (tile.block_m - 1)) // tile.block_m
    return Plan(num_pairs, tile, min(triton.cdiv(num_pairs, moe_sort.RUN), moe_sort.MAX_PROGRAMS), num_blocks)


def _bins(num_experts: int) -> int:
    return triton.next_power_of_2(num_experts + 1)


def workspace(p: Plan, hidden: int, inter: int, num_experts: int) -> Sizes:
    """What `launch` needs for experts of [N = hidden, I = inter]."""
    if p.tile is None:
        return Sizes(p.num_pairs * inter, 0, 0)
    blocks = 1 + moe_sort.BLOCK_FIELDS.value * p.num_blocks
    return Sizes(p.num_pairs * inter, p.num_pairs * hidden, p.num_pairs + p.num_programs * _bins(num_experts) + blocks)


def _sort(p: Plan, indices: Tensor, num_experts: int, block_m: int, ints: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs in the order of their experts, and the list of blocks."""
    bins = _bins(num_experts)
    order, counts, blocks = ints.split([p.num_pairs, p.num_programs * bins, 1 + 3 * p.num_blocks])
    share = triton.cdiv(triton.cdiv(p.num_pairs, moe_sort.RUN), p.num_programs) * moe_sort.RUN
    sizes = {"RUN": moe_sort.RUN, "EXPERTS": bins, "num_warps": 8}
    moe_sort.count_kernel[(p.num_programs,)](indices, counts, p.num_pairs, share, num_experts, **sizes)
    moe_sort.place_kernel[(p.num_programs + 1,)](
        indices, counts, order, blocks, p.num_pairs, share, p.num_programs, num_experts, BLOCK_M=block_m, **sizes
    )
    return order, blocks


def _launch_decode(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, out: Tensor, hidden: Tensor
) -> None:
    (tokens, top_k), (experts, cols, inter) = indices.shape, down_proj.shape
    block_n, block_k = DECODE_COLS["gate_up"], DECODE_INNER
    decode_gate_up_kernel[(tokens * top_k, triton.cdiv(inter, block_n))](
        x, indices, gate_up_proj, hidden, cols, inter, experts, x.stride(0), *gate_up_proj.stride()[:2],
        TOP_K=top_k, BLOCK_N=block_n, BLOCK_K=block_k, EVEN=cols % block_k == 0, num_warps=4,
    )  # fmt: skip
    block_n, slots = DECODE_COLS["down"], triton.next_power_of_2(top_k)
    decode_down_kernel[(tokens, triton.cdiv(cols, block_n))](
        hidden, indices, weights, down_proj, out, inter, cols, experts, *down_proj.stride()[:2],
        TOP_K=top_k, SLOTS=slots, BLOCK_N=block_n, BLOCK_K=block_k, EVEN=inter % block_k == 0, num_warps=4,
        debug=True, sanitize_overflow=False,  # a wrong id stops the device, as it does in torch's own indexing
    )  # fmt: skip


def launch(
    p: Plan,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    out: Tensor,
    hidden: Tensor,
    rows: Tensor,
    ints: Tensor,
) -> None:
    """The experts' weighted sum for x [T, N] to out [T, N], contiguous.

    indices int64 and weights [T, K], contiguous; gate_up_proj [E, 2I, N] and down_proj [E, N, I]; unit strides in the
    last dimension. `hidden`, `rows` and `ints` as `workspace` says.
    """
    (tokens, top_k), (experts, cols, inter), tile = indices.shape, down_proj.shape, p.tile
    if tile is None:
        _launch_decode(x, indices, weights, gate_up_proj, down_proj, out, hidden)
        return
    order, blocks = _sort(p, indices, experts, tile.block_m, ints)
    shape = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    shape |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    gate_up_kernel[(triton.cdiv(2 * inter, tile.block_n) * p.num_blocks,)](
        x, order, blocks, gate_up_proj, hidden, cols, inter, x.stride(0), *gate_up_proj.stride()[:2],
        TOP_K=top_k, EVEN=cols % tile.block_k == 0, **shape,
    )  # fmt: skip
    down_kernel[(triton.cdiv(cols, tile.block_n) * p.num_blocks,)](
        hidden, order, blocks, weights, down_proj, rows, inter, cols, *down_proj.stride()[:2],
        EVEN=inter % tile.block_k == 0, **shape,
    )  # fmt: skip
    combine_kernel[(tokens, triton.cdiv(cols, COMBINE_COLS))](
        rows, indices, out, cols, experts, TOP_K=top_k, SLOTS=triton.next_power_of_2(top_k), BLOCK=COMBINE_COLS,
        debug=True, sanitize_overflow=False,  # see above
    )  # fmt: skip
