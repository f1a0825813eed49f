"""attention: scaled dot-product attention with grouped key/value heads over the keys present."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops import cpu, library, triton
from qwenopt.ops.op import Op
from qwenopt.ops.steps import Array, Steps
from qwenopt.ops.triton import attention as by_triton

# Largest head_dim of the native kernel (its accumulators live on the stack).
MAX_HEAD_DIM = 256
_MANY_KEYS = 1 << 30
MASK_KINDS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_positions: Tensor | None,
    is_causal: bool,
    scale: float,
) -> None:
    ok = q.dim() == 4 and k.dim() == 4 and v.dim() == 4 and k.shape == v.shape
    ok = ok and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and q.shape[1] % k.shape[1] == 0
    torch._check(
        ok,
        lambda: (
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "need (B, H, S, D), (B, G, L, D), (B, G, L, D) with H a multiple of G"
        ),
    )
    if mask is not None:
        full = (*q.shape[:3], k.shape[2])
        pairs = zip(reversed(mask.shape), reversed(full), strict=False)
        torch._check(
            mask.dim() <= 4 and all(a == 1 or a == b for a, b in pairs),
            lambda: f"attention: mask {tuple(mask.shape)}; it must broadcast to (B, H, S, L) = {full}",
        )
    if q_positions is not None:
        torch._check(
            q_positions.dim() == 1 and q_positions.shape[0] == q.shape[2],
            lambda: f"attention: q_positions {tuple(q_positions.shape)}; need one for each query, ({q.shape[2]},)",
        )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_positions: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """`softmax(q @ k.T * scale + mask) @ v`, each key/value head shared by H / G query heads.

    q [B, H, S, D]; k and v [B, G, L, D]; mask broadcastable to [B, H, S, L], bool (True: visible) or additive float.
    Row i sees key j iff the mask allows it and j <= q_positions[i] (int64 [S], if given) and j <= i (if `is_causal`).
    Returns [B, H, S, D], laid out as a transposed [B, S, H, D].
    """
    _check(q, k, v, mask, q_positions, is_causal, scale)
    groups, length = k.shape[1], k.shape[2]
    if groups != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // groups, dim=1)
        v = v.repeat_interleave(q.shape[1] // groups, dim=1)
    if q_positions is not None:
        keys = torch.arange(length, device=q.device)
        visible = keys[None, :] <= q_positions[:, None]
        mask = (
            visible
            if mask is None
            else (mask & visible if mask.dtype == torch.bool else mask.where(visible, -torch.inf))
        )
    if is_causal and mask is not None:
        keys = torch.arange(length, device=q.device)
        visible = keys[None, :] <= torch.arange(q.shape[2], device=q.device)[:, None]
        mask = mask & visible if mask.dtype == torch.bool else mask.where(visible, -torch.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal and mask is None, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


ATTENTION = Op(attention, check=_check)


def _accepts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_positions: Tensor | None, is_causal: bool, scale: float
) -> str | None:
    dim = q.shape[-1]
    if not isinstance(dim, int) or dim > MAX_HEAD_DIM or dim % 2:
        return f"head_dim {dim} (kernel: even, at most {MAX_HEAD_DIM})"
    if mask is not None and (mask.dim() != 4 or mask.dtype not in MASK_KINDS):
        return f"mask {mask.dtype} of {mask.dim()} dimensions (kernel: bool, float32, bfloat16 or float16 of 4)"
    if q_positions is not None and (q_positions.dtype != torch.int64 or not q_positions.is_contiguous()):
        return f"q_positions {q_positions.dtype} of stride {q_positions.stride()} (kernel: torch.int64, contiguous)"
    return cpu.one_dtype(q, k, v) or cpu.last_dim_contiguous(q=q, k=k, v=v)


def _sizes(q: Any, k: Any) -> tuple[Any, ...]:
    batch, heads, seq, dim = q.shape
    return batch, heads, k.shape[1], seq, k.shape[2], dim


def _operands(
    q: Any, k: Any, v: Any, mask: Any, q_positions: Any, out: Any, scratch: Any, is_causal: bool, scale: float
) -> tuple[Any, ...]:
    mask_strides, kind = (0, 0, 0, 0), 0
    if mask is not None:
        mask_strides = mask.expand((*q.shape[:3], k.shape[2])).stride()
        kind = MASK_KINDS[mask.dtype]
    return (
        *(0 if t is None else t.data_ptr() for t in (q, k, v, mask, q_positions, out, scratch)),
        *_sizes(q, k),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *mask_strides,
        kind,
        is_causal,
        scale,
        cpu.code(q),
    )


def _record(
    steps: Steps,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    q_positions: Array | None,
    is_causal: bool,
    scale: float,
) -> Array:
    batch, heads, seq, dim = q.static_shape()
    # The scratch grows with the number of keys up to a bound, so where that number is not known the bound is taken.
    most = tuple(size if isinstance(size, int) else _MANY_KEYS for size in _sizes(q, k))
    out = steps.empty((batch, seq, heads, dim), q.dtype)
    scratch = steps.scratch(cpu.lib().attention_scratch_bytes(*most, steps.threads))
    operands = _operands(q, k, v, mask, q_positions, out, scratch, is_causal, scale)
    steps.add("attention", operands, (q, k, v, mask, q_positions), (out, scratch))
    return out.transpose(1, 2)


@ATTENTION.provider("cpu", "cpu", available=cpu.available, accepts=_accepts, record=_record)
def attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_positions: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    lib, threads = cpu.lib(), cpu.threads()
    batch, heads, seq, dim = q.shape
    out = torch.empty((batch, seq, heads, dim), dtype=q.dtype)
    scratch = torch.empty(lib.attention_scratch_bytes(*_sizes(q, k), threads), dtype=torch.uint8)
    lib.attention(*_operands(q, k, v, mask, q_positions, out, scratch, is_causal, scale), threads)
    return out.transpose(1, 2)


ATTENTION.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(by_triton.attention)
ATTENTION.provider("torch", "cuda", available=library.available, accepts=library.accepts_attention)(library.attention)
