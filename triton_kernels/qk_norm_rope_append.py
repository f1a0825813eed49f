"""qk_norm_rope and the append behind it in one Triton kernel: rotated keys go from registers to their place in a cache.

The cache is pages and slots, or a static one: then batch entry b is page b, and the place in it a token's position.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from qwenopt.triton_kernels.kv_append import INT8_MAX, code_factor, codes
from qwenopt.triton_kernels.qk_norm_rope import heads_of, rotated_heads, strides, write_heads


class ValueStrides(NamedTuple):
    """Strides in elements of v [B, G, S, D]; that of D is 1."""

    batch: int
    head: int
    token: int


class PoolStrides(NamedTuple):
    """Strides in elements of a pool [pages, G, page_size, D] and of its scales; that of D is 1."""

    page: int
    head: int
    place: int
    scale_page: int
    scale_head: int
    scale_place: int


@triton.jit
def _largest(x):
    """The largest of each head, or NaN where one of its numbers is a NaN or an infinity."""
    return tl.max(tl.abs(x), 1) + tl.sum(x * 0.0, 1)


@triton.jit
def _to_page(
    low, high, pool_ptr, scale_ptr, page, place, s, head, num_heads, DIM: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Both halves of heads of one token to their place in a page, as codes where there are scales."""
    dim = tl.arange(0, HALF)
    half: tl.constexpr = DIM // 2
    keep = (head < num_heads)[:, None] & (dim < half)[None, :]
    if scale_ptr is not None:
        low, high = low.to(tl.float32), high.to(tl.float32)
        low_largest, high_largest = _largest(low), _largest(high)
        # Not the maximum of the two alone: of a NaN and a number it may be either.
        largest = tl.maximum(low_largest, high_largest) + (low_largest + high_largest) * 0.0
        low, high = codes(low, code_factor(largest)), codes(high, code_factor(largest))
        at = page * s.scale_page + head * s.scale_head + place * s.scale_place
        tl.store(scale_ptr + at, tl.div_rn(largest, INT8_MAX), mask=head < num_heads)
    pool_ptr += page * s.page + head[:, None] * s.head + place * s.place + dim[None, :]
    tl.store(pool_ptr, low.to(pool_ptr.dtype.element_ty), mask=keep)
    tl.store(pool_ptr + half, high.to(pool_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _page_of(slots_ptr, token, num_tokens, num_slots, PAGE: tl.constexpr):
    """Page and place that a token goes to, and whether it goes anywhere."""
    if PAGE == 0:
        place = tl.load(slots_ptr) + token % num_tokens
        inside = (place >= 0) & (place < num_slots)
        tl.device_assert(inside, "static cache: more tokens than it has places for")
        return (token // num_tokens).to(tl.int64), place, inside
    else:  # noqa: RET505 - a branch that is not compiled
        slot = tl.load(slots_ptr + token)
        # Negative: nothing to write. Past the pool: a mistake of the caller's that must not write to foreign memory.
        return slot // PAGE, slot % PAGE, (slot >= 0) & (slot < num_slots)


@triton.jit(do_not_specialize=["num_tokens", "q_heads", "k_heads", "num_slots"])
def qk_norm_rope_append_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, v_ptr, k_pool_ptr, v_pool_ptr, k_scale_ptr,
    v_scale_ptr, slots_ptr, q_strides, k_strides, v_strides, k_pool_strides, v_pool_strides,
    num_tokens, q_heads, k_heads, num_slots, eps,
    PAGE: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Some heads of one token a program: of its queries, of its keys, or of its values.

    PAGE: the places of a page. 0: a static cache; then `slots_ptr` is that of its length, and `num_slots` its places.
    """
    token, block = tl.program_id(0), tl.program_id(1)
    q_blocks, k_blocks = tl.cdiv(q_heads, HEADS), tl.cdiv(k_heads, HEADS)
    if block < q_blocks:
        write_heads(
            q_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, q_strides, token, num_tokens, block * HEADS, q_heads, eps,
            DIM, HEADS, HALF,
        )  # fmt: skip
        return
    page, place, inside = _page_of(slots_ptr, token, num_tokens, num_slots, PAGE)
    if not inside:
        return
    if block < q_blocks + k_blocks:
        head = (block - q_blocks) * HEADS + tl.arange(0, HEADS)
        low, high = rotated_heads(
            k_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_strides, token, num_tokens, head, k_heads, eps, DIM, HALF
        )
        _to_page(low, high, k_pool_ptr, k_scale_ptr, page, place, k_pool_strides, head, k_heads, DIM, HALF)
    else:
        head, dim = (block - q_blocks - k_blocks) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF)
        batch, at = (token // num_tokens).to(tl.int64), (token % num_tokens).to(tl.int64)
        keep = (head < k_heads)[:, None] & (dim < DIM // 2)[None, :]
        vs = v_ptr + batch * v_strides.batch + at * v_strides.token + head[:, None] * v_strides.head + dim[None, :]
        low, high = tl.load(vs, mask=keep, other=0), tl.load(vs + DIM // 2, mask=keep, other=0)
        _to_page(low, high, v_pool_ptr, v_scale_ptr, page, place, v_pool_strides, head, k_heads, DIM, HALF)


def _pool_strides(pool: Tensor, scale: Tensor | None) -> PoolStrides:
    return PoolStrides(*pool.stride()[:3], *(scale.stride() if scale is not None else (0, 0, 0)))


def launch(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    v: Tensor,
    slots: Tensor,
    q_out: Tensor,
) -> None:
    """Norm and rotate q [B, S, H, D] into a contiguous one, and k [B, S, G, D] into pools [pages, G, page_size, D].

    v [B, G, S, D] goes with k, to slots int64 [B * S]; cos and sin [B or 1, S, D].
    """
    num_pages, _, page_size, _ = k_pool.shape
    pools = (k_pool, v_pool, k_scale, v_scale)
    _launch(q, k, q_weight, k_weight, cos, sin, eps, pools, v, slots, q_out, page_size, num_pages * page_size)


def launch_static(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    length: Tensor,
    q_out: Tensor,
) -> None:
    """The same into keys and values [B, G, L, D] of a static cache, from the place on that length int64 [] says."""
    pools = (keys, values, None, None)
    _launch(q, k, q_weight, k_weight, cos, sin, eps, pools, v, length, q_out, 0, keys.shape[2])


def _launch(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    pools: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    v: Tensor,
    slots: Tensor,
    q_out: Tensor,
    page_size: int,
    num_slots: int,
) -> None:
    (batch, num_tokens, q_heads, dim), k_heads = q.shape, k.shape[2]
    k_pool, v_pool, k_scale, v_scale = pools
    heads, half = heads_of(batch * num_tokens), triton.next_power_of_2(dim // 2)
    grid = (batch * num_tokens, triton.cdiv(q_heads, heads) + 2 * triton.cdiv(k_heads, heads))
    qk_norm_rope_append_kernel[grid](
        q, k, q_weight, k_weight, cos, sin, q_out, v, *pools, slots,
        strides(q, cos, sin), strides(k, cos, sin), ValueStrides(*v.stride()[:3]),
        _pool_strides(k_pool, k_scale), _pool_strides(v_pool, v_scale),
        num_tokens, q_heads, k_heads, num_slots, eps, PAGE=page_size, DIM=dim, HEADS=heads, HALF=half,
        num_warps=max(1, heads * half // 512), enable_fp_fusion=False,  # for the codes, as in kv_append
        debug=page_size == 0, sanitize_overflow=False,  # a static cache that is full stops the device, as in torch
    )  # fmt: skip
