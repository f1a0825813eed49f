"""kv_append in Triton: one program writes the keys, or the values, of one token to its slot in every head."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

INT8_MAX = tl.constexpr(127.0)
# Added to a float32 below 2**22 and taken off again, it leaves the nearest whole number, ties to even.
ROUNDER = tl.constexpr(12582912.0)


class Strides(NamedTuple):
    """Strides in elements of what is read ([B, G, S, D]) and of the pool and its scales; those of D are 1."""

    batch: int
    head: int
    token: int
    pool_page: int
    pool_head: int
    pool_place: int
    scale_page: int
    scale_head: int
    scale_place: int


@triton.jit
def code_factor(largest):
    """What numbers are multiplied by before they are rounded to codes, from the largest of their token and head."""
    # torch divides a number by a tensor so: a reciprocal, then a product.
    return tl.where(largest > 0, tl.div_rn(1.0, tl.where(largest > 0, largest, 1.0)) * INT8_MAX, 0.0)


@triton.jit
def codes(x, factor):
    """float32 numbers as whole ones of -127 to 127. Their scale is `largest / 127`."""
    return (x * factor[:, None] + ROUNDER) - ROUNDER


@triton.jit
def _write(x_ptr, pool_ptr, scale_ptr, batch, token, page, place, s, HEADS, DIM, BLOCK_G, BLOCK_D):
    heads, dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    keep = (heads < HEADS)[:, None] & (dims < DIM)[None, :]
    x = tl.load(x_ptr + batch * s.batch + token * s.token + heads[:, None] * s.head + dims[None, :], mask=keep, other=0)
    if scale_ptr is not None:
        x = x.to(tl.float32)
        # A sum of zeros, unless one of them comes from a NaN or an infinity: then the scale says so, as the maximum
        # alone would not.
        largest = tl.max(tl.abs(x), 1) + tl.sum(x * 0.0, 1)
        x = codes(x, code_factor(largest))
        at = page * s.scale_page + place * s.scale_place + heads * s.scale_head
        tl.store(scale_ptr + at, tl.div_rn(largest, INT8_MAX), mask=heads < HEADS)
    at = page * s.pool_page + place * s.pool_place + heads[:, None] * s.pool_head + dims[None, :]
    tl.store(pool_ptr + at, x.to(pool_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def kv_append_kernel(
    k_ptr,
    v_ptr,
    k_pool_ptr,
    v_pool_ptr,
    k_scale_ptr,
    v_scale_ptr,
    slots_ptr,
    k_strides,
    v_strides,
    num_tokens,
    num_slots,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    index = tl.program_id(0)
    slot = tl.load(slots_ptr + index)
    # Negative: nothing to write. Past the pool: a mistake of the caller's that must not write to foreign memory.
    if (slot < 0) | (slot >= num_slots):
        return
    page, place = slot // PAGE, slot % PAGE
    batch, token = (index // num_tokens).to(tl.int64), (index % num_tokens).to(tl.int64)
    if tl.program_id(1) == 0:
        _write(k_ptr, k_pool_ptr, k_scale_ptr, batch, token, page, place, k_strides, HEADS, DIM, BLOCK_G, BLOCK_D)
    else:
        _write(v_ptr, v_pool_ptr, v_scale_ptr, batch, token, page, place, v_strides, HEADS, DIM, BLOCK_G, BLOCK_D)


def _strides(x: Tensor, pool: Tensor, scale: Tensor | None) -> Strides:
    return Strides(*x.stride()[:3], *pool.stride()[:3], *(scale.stride() if scale is not None else (0, 0, 0)))


def launch(
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
) -> None:
    """Write k and v [B, G, S, D] to the pools [pages, G, page_size, D] at slots int64 [B * S]."""
    num_pages, heads, page_size, dim = k_pool.shape
    block_g, block_d = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    kv_append_kernel[(slots.shape[0], 2)](
        k,
        v,
        k_pool,
        v_pool,
        k_scale,
        v_scale,
        slots,
        _strides(k, k_pool, k_scale),
        _strides(v, v_pool, v_scale),
        k.shape[2],
        num_pages * page_size,
        PAGE=page_size,
        HEADS=heads,
        DIM=dim,
        BLOCK_G=block_g,
        BLOCK_D=block_d,
        num_warps=min(8, max(1, block_g * block_d // 256)),  # 8 elements a thread: 16 bytes of a 16-bit dtype
        enable_fp_fusion=False,  # `x * factor + ROUNDER` in one rounding would give codes other than the reference's
    )
