"""qk_norm_rope on a GPU: a warp for each token and head; alone, or with the kv_append that follows it."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops import cpu
from qwenopt.ops.cuda import DTYPES, kv_append
from qwenopt.ops.cuda.launch import WARP, Launch, Run, dtype_name, pack

THREADS = 128
MAX_HEAD_DIM = 256


def accepts(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> str | None:
    if q.shape[3] > MAX_HEAD_DIM:
        return f"head_dim {q.shape[3]} (the kernel has up to {MAX_HEAD_DIM})"
    return cpu.one_dtype(q, k, q_weight, k_weight, cos, sin, among=DTYPES) or cpu.last_dim_contiguous(
        q=q, k=k, q_weight=q_weight, k_weight=k_weight
    )


def _args(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    outs: tuple[Tensor, Tensor | None],
    eps: float,
) -> bytes:
    batch, seq, heads, dim = q.shape
    return pack(
        *(q, k, q_weight, k_weight, cos, sin, *outs),
        *(batch, seq, heads, k.shape[2], dim),
        *q.stride()[:3],
        *k.stride()[:3],
        *(cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)),
        float(eps),
    )


def _launch(name: str, items: int, args: bytes) -> Launch:
    return Launch(name, (-(-items * WARP // THREADS), 1, 1), THREADS, args)


def qk_norm_rope(
    run: Run, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    cos, sin = cos.contiguous(), sin.contiguous()
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=q.dtype, device=q.device)
    batch, seq, heads, _ = q.shape
    items = batch * seq * (heads + k.shape[2])
    if items:
        args = _args(q, k, q_weight, k_weight, cos, sin, (q_out, k_out), eps)
        run(_launch(f"qk_norm_rope_{dtype_name(q)}", items, args))
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def accepts_append(
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
) -> str | None:
    if k_pool.dtype not in (q.dtype, torch.int8):
        return f"pools of {k_pool.dtype} for keys of {q.dtype} (kernel: the same, or int8)"
    rotated = k.transpose(1, 2)
    return accepts(q, k, q_weight, k_weight, cos, sin, eps) or kv_append.accepts(
        k_pool, v_pool, k_scale, v_scale, rotated, v, slots
    )


def qk_norm_rope_append(
    run: Run,
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
) -> Tensor:
    """`q` as qk_norm_rope gives it; its keys, and `v` [B, G, S, D], go to their slots as kv_append puts them."""
    cos, sin = cos.contiguous(), sin.contiguous()
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    batch, seq, heads, _ = q.shape
    items = batch * seq * (heads + 2 * k.shape[2])
    if items:
        args = _args(q, k, q_weight, k_weight, cos, sin, (q_out, None), eps)
        args += kv_append.args_of(k_pool, v_pool, k_scale, v_scale, None, v, slots)
        name = f"qk_norm_rope_append_{dtype_name(q)}_{kv_append.POOL_NAMES[k_pool.dtype]}"
        run(_launch(name, items, args))
    return q_out.transpose(1, 2)
