"""qk_norm_rope in Triton: a program takes some heads of one token, of its queries or of its keys."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Up to so many tokens a warp takes one head: nothing is so quick. Of more, it takes several, whose loads overlap.
# Not tuned on a device.
FEW_TOKENS = 64
MANY_HEADS = 8


class Strides(NamedTuple):
    """Strides in elements of q or k [B, S, heads, D] and of cos and sin [B or 1, S, D]; those of D are 1."""

    batch: int
    token: int
    head: int
    cos_batch: int
    cos_token: int
    sin_batch: int
    sin_token: int


@triton.jit
def _rotated(low, high, cos, sin):
    """`low * cos + high * sin`, each product rounded to the dtype as the sum is; all [HEADS, HALF]."""
    a = (low.to(tl.float32) * cos.to(tl.float32)[None, :]).to(low.dtype)
    b = (high.to(tl.float32) * sin.to(tl.float32)[None, :]).to(low.dtype)
    return (a.to(tl.float32) + b.to(tl.float32)).to(low.dtype)


@triton.jit
def _weighted(x, rms, weight):
    x = (x.to(tl.float32) * rms[:, None]).to(weight.dtype)
    return (x.to(tl.float32) * weight.to(tl.float32)[None, :]).to(weight.dtype)


@triton.jit
def rotated_heads(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, s, token, num_tokens, head, num_heads, eps,
    DIM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Those heads of one token, normed and rotated: [heads, HALF] twice.

    The halves of each are apart, since the rotation turns one into the other.
    """
    batch, place = (token // num_tokens).to(tl.int64), (token % num_tokens).to(tl.int64)
    dim = tl.arange(0, HALF)
    half: tl.constexpr = DIM // 2
    seen = dim < half
    keep = (head < num_heads)[:, None] & seen[None, :]
    x_ptr += batch * s.batch + place * s.token + head[:, None] * s.head + dim[None, :]
    low, high = tl.load(x_ptr, mask=keep, other=0), tl.load(x_ptr + half, mask=keep, other=0)
    low_weight = tl.load(weight_ptr + dim, mask=seen, other=0)
    high_weight = tl.load(weight_ptr + half + dim, mask=seen, other=0)
    cos_ptr += batch * s.cos_batch + place * s.cos_token + dim
    sin_ptr += batch * s.sin_batch + place * s.sin_token + dim
    low_cos, high_cos = tl.load(cos_ptr, mask=seen, other=0), tl.load(cos_ptr + half, mask=seen, other=0)
    low_sin, high_sin = tl.load(sin_ptr, mask=seen, other=0), tl.load(sin_ptr + half, mask=seen, other=0)

    a, b = low.to(tl.float32), high.to(tl.float32)
    rms = tl.rsqrt(tl.div_rn(tl.sum(a * a + b * b, 1), DIM * 1.0) + eps)
    low, high = _weighted(low, rms, low_weight), _weighted(high, rms, high_weight)
    return _rotated(low, -high, low_cos, low_sin), _rotated(high, low, high_cos, high_sin)


@triton.jit
def write_heads(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, s, token, num_tokens, first, num_heads, eps,
    DIM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Heads `first` on of one token, to contiguous [tokens, heads, D]."""
    head, dim = first + tl.arange(0, HEADS), tl.arange(0, HALF)
    low, high = rotated_heads(
        x_ptr, weight_ptr, cos_ptr, sin_ptr, s, token, num_tokens, head, num_heads, eps, DIM, HALF
    )
    keep = (head < num_heads)[:, None] & (dim < DIM // 2)[None, :]
    out_ptr += (token.to(tl.int64) * num_heads + head[:, None]) * DIM + dim[None, :]
    tl.store(out_ptr, low, mask=keep)
    tl.store(out_ptr + DIM // 2, high, mask=keep)


@triton.jit(do_not_specialize=["num_tokens", "q_heads", "k_heads"])
def qk_norm_rope_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, q_strides, k_strides,
    num_tokens, q_heads, k_heads, eps, DIM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token, block, q_blocks = tl.program_id(0), tl.program_id(1), tl.cdiv(q_heads, HEADS)
    if block < q_blocks:
        write_heads(
            q_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, q_strides, token, num_tokens, block * HEADS, q_heads, eps,
            DIM, HEADS, HALF,
        )  # fmt: skip
    else:
        write_heads(
            k_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_out_ptr, k_strides, token, num_tokens, (block - q_blocks) * HEADS,
            k_heads, eps, DIM, HEADS, HALF,
        )  # fmt: skip


def strides(x: Tensor, cos: Tensor, sin: Tensor) -> Strides:
    """Those of `x` [B, S, heads, D] and of its tables."""
    tables = (stride for t in (cos, sin) for stride in (t.stride(0) if t.shape[0] > 1 else 0, t.stride(1)))
    return Strides(*x.stride()[:3], *tables)


def heads_of(tokens: int) -> int:
    """How many heads a program takes."""
    return 1 if tokens <= FEW_TOKENS else MANY_HEADS


def launch(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    eps: float,
) -> None:
    """Norm and rotate q [B, S, H, D] and k [B, S, G, D] into contiguous ones; cos and sin [B or 1, S, D]."""
    batch, num_tokens, q_heads, dim = q.shape
    k_heads = k.shape[2]
    heads, half = heads_of(batch * num_tokens), triton.next_power_of_2(dim // 2)
    qk_norm_rope_kernel[(batch * num_tokens, triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads))](
        q, k, q_weight, k_weight, cos, sin, q_out, k_out, strides(q, cos, sin), strides(k, cos, sin),
        num_tokens, q_heads, k_heads, eps, DIM=dim, HEADS=heads, HALF=half,
        num_warps=max(1, heads * half // 512),
    )  # fmt: skip
