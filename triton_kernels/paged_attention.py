"""paged_attention in Triton: which kernels run for which shapes, with which tiles, and their launches.

Three kernels: `flat_kernel` cuts the tiles of all rows into equal shares (decode, short chunks), `combine_kernel` joins
what it left in parts, `blocks_kernel` has one program for each block of queries (prefill). The choice depends on shapes
alone and every grid is an upper bound, so a CUDA graph that recorded a call serves any lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from qwenopt.triton_kernels.paged_blocks import blocks_kernel
from qwenopt.triton_kernels.paged_flat import PART_FIELDS, combine_kernel, flat_kernel
from qwenopt.triton_kernels.paged_tiles import Strides


@dataclass(frozen=True)
class Tile:
    """Queries times heads of a block, keys of a tile, and how the compiler is to spread them."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (bytes of q's dtype, largest head_dim) -> tile. At most 99 KB of shared memory, which every GPU from compute
# capability 8.0 on has (Hopper: 112 KB, half of what it has), and next to no registers spilled: the tests compile them
# and hold both. Not tuned on a device; float32, which is multiplied without tensor cores, is there to be exact.
FLOAT32 = {(4, 64): Tile(16, 16, 8, 2), (4, 128): Tile(16, 16, 8, 2), (4, 256): Tile(16, 16, 4, 2)}
DECODE = {(2, 64): Tile(16, 64, 4, 5), (2, 128): Tile(16, 64, 4, 5), (2, 256): Tile(16, 32, 4, 3), **FLOAT32}
CHUNK = {(2, 64): Tile(64, 64, 4, 3), (2, 128): Tile(64, 64, 4, 2), (2, 256): Tile(32, 32, 4, 2), **FLOAT32}
PREFILL = {(2, 64): Tile(128, 64, 4, 3), (2, 128): Tile(64, 64, 4, 3), (2, 256): Tile(64, 32, 8, 2), **FLOAT32}
# wgmma leaves registers free for larger blocks.
PREFILL_HOPPER = {**PREFILL, (2, 128): Tile(128, 64, 8, 3)}
PROGRAMS_PER_SM = 2  # of the flat list: two blocks of 4 warps on each multiprocessor
MIN_TILES = 2  # of a share: a shorter one costs more to start and to combine than it saves


class Device(NamedTuple):
    """What the plan depends on: the number of multiprocessors and the major compute capability."""

    num_sms: int
    major: int


@dataclass(frozen=True)
class Plan:
    """What a call launches: `flat` and its programs (0: not at all), `blocks` and the rows that it leaves to `flat`."""

    flat: Tile
    num_programs: int
    blocks: Tile | None
    num_blocks: int
    skip: int

    @property
    def num_parts(self) -> int:
        """Rows of partial results: two blocks for each program."""
        return 2 * self.num_programs * self.flat.block_m


def _pick(table: dict[tuple[int, int], Tile], itemsize: int, dim: int) -> Tile:
    return table[itemsize, next(d for d in (64, 128, 256) if dim <= d)]


def plan(q: Tensor, kv_heads: int, num_rows: int, packed: bool, device: Device) -> Plan:
    """The launches for q [B, H, S, D]: `num_rows` rows of S queries each or, `packed`, of S queries together."""
    num_tokens, dim, itemsize, group = q.shape[2], q.shape[3], q.element_size(), q.shape[1] // kv_heads
    decode, chunk, prefill = (
        _pick(table, itemsize, dim) for table in (DECODE, CHUNK, PREFILL_HOPPER if device.major == 9 else PREFILL)
    )
    num_programs = PROGRAMS_PER_SM * device.num_sms
    per_block = decode.block_m // group
    if num_tokens <= (num_rows * per_block if packed else per_block):
        return Plan(decode, num_programs, None, 0, 0)
    per_block = prefill.block_m // group
    num_blocks = num_tokens // per_block + num_rows + 1 if packed else num_rows * triton.cdiv(num_tokens, per_block)
    # Too few blocks to fill the device: share their keys out, too.
    if (num_tokens // per_block if packed else num_blocks) * kv_heads < device.num_sms:
        return Plan(chunk, num_programs, None, 0, 0)
    if packed:  # decoding rows may be among them
        return Plan(decode, num_programs, prefill, num_blocks, decode.block_m // group)
    return Plan(decode, 0, prefill, num_blocks, 0)


def _padded(dim: int) -> int:
    """Columns of a block of heads: a matrix instruction sums over 16 at least."""
    return max(16, triton.next_power_of_2(dim))


def workspace(p: Plan, dim: int) -> tuple[int, int]:
    """How many float32 and how many int32 `launch` needs for itself."""
    return p.num_parts * (_padded(dim) + 1), p.num_programs * PART_FIELDS.value


def _strides(
    q: Tensor, out: Tensor, pool: Tensor, scale: Tensor | None, table: Tensor | None, mask: Tensor | None
) -> Strides:
    return Strides(
        *q.stride()[:3],
        *out.stride()[:3],
        *pool.stride()[:3],
        *(scale.stride() if scale is not None else (0, 0, 0)),
        table.stride(0) if table is not None else 0,
        *(mask.stride() if mask is not None else (0, 0, 0, 0)),
    )


def _stages(tile: Tile, block_table: Tensor | None, by_table: int) -> int:
    """Stages of the pipeline; `by_table` of them are needed for the table's entries, which take no shared memory."""
    return tile.num_stages if block_table is not None else max(2, tile.num_stages - by_table)


def launch(
    p: Plan,
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor | None,
    q_starts: Tensor | None,
    q_positions: Tensor | None,
    mask: Tensor | None,
    window: int,
    scale: float,
    out: Tensor,
    floats: Tensor,
    ints: Tensor,
) -> None:
    """Attention of q [B, H, S, D] into `out`, of the same shape; the mask is None or expanded to [B, H, S, keys].

    Without a block table the keys of row b are page b: the pools are keys and values [B, G, L, D] of any length L.
    """
    kv_heads, page_size, dim = k_pool.shape[1:]
    rows, row_pages = (k_pool.shape[0], 1) if block_table is None else block_table.shape
    masked = "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"
    mask = mask.view(torch.uint8) if masked == "bool" else mask
    s = _strides(q, out, k_pool, k_scale, block_table, mask)
    tensors = (q, k_pool, v_pool, k_scale, v_scale, block_table, q_starts, q_positions, mask, out)
    sizes = (rows, q.shape[2], row_pages * page_size, k_pool.shape[0], scale)
    packed, block_d = q_starts is not None, _padded(dim)
    shape = {"GROUP": q.shape[1] // kv_heads, "DIM": dim, "BLOCK_D": block_d}
    rest = {"WINDOW": window, "MASK": masked, "ROWS": triton.next_power_of_2(rows + 1)}
    rest["PAGE"] = page_size if block_table is not None else 0  # a length must not be compiled in
    if p.num_programs:
        tile, skip = p.flat, p.skip > 0
        lse, partial = floats[: p.num_parts], floats[p.num_parts :]
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "num_warps": tile.num_warps}
        flat_kernel[(p.num_programs,)](
            *tensors, partial, lse, ints, s, *sizes, KV_HEADS=kv_heads, MIN_TILES=MIN_TILES, SHORT=skip,
            num_stages=_stages(tile, block_table, 2), **shape, **rest, **blocks,
        )  # fmt: skip
        combine_kernel[(p.num_programs, 16)](
            partial, lse, ints, out, s, BLOCK_M=tile.block_m, BLOCK_P=16, PACKED=packed, num_warps=4, **shape
        )
    if p.blocks is not None:
        tile = p.blocks
        blocks_kernel[(p.num_blocks, kv_heads)](
            *tensors, s, *sizes, SKIP=p.skip, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            num_warps=tile.num_warps, num_stages=_stages(tile, block_table, 1), **shape, **rest,
        )  # fmt: skip
