"""qk_norm_rope: per-head rms_norm of queries and keys, then rotary position embedding (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qwenopt.ops import cpu, triton
from qwenopt.ops.cuda import qk_norm_rope as cuda_kernels
from qwenopt.ops.cuda.providers import register
from qwenopt.ops.op import Op
from qwenopt.ops.rms_norm import check_norm, rms_norm
from qwenopt.ops.steps import Array, Steps, need_contiguous
from qwenopt.ops.triton import qk_norm_rope as by_triton


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + rotated * sin


def check_heads(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
    """Raise unless queries, keys, weights and tables fit together."""
    torch._check(
        q.dim() == 4 and k.dim() == 4 and q.shape[-1] == k.shape[-1] and q.shape[:2] == k.shape[:2],
        lambda: f"qk_norm_rope: q {tuple(q.shape)} and k {tuple(k.shape)}; need (B, S, H, D) and (B, S, G, D)",
    )
    ok = cos.dim() == 3 and cos.shape == sin.shape and cos.shape[-1] == q.shape[-1] and q.shape[-1] % 2 == 0
    torch._check(
        ok and cos.shape[1] == q.shape[1] and (cos.shape[0] == 1 or cos.shape[0] == q.shape[0]),
        lambda: (
            f"qk_norm_rope: cos {tuple(cos.shape)}, sin {tuple(sin.shape)}, head_dim {q.shape[-1]}; "
            f"need (B or 1, S, D) twice with D even, for q {tuple(q.shape)}"
        ),
    )
    for weight in (q_weight, k_weight):
        check_norm("qk_norm_rope", q, weight)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Norm and rotate queries and keys.

    q [B, S, H, D], k [B, S, G, D]; q_weight and k_weight [D]; cos and sin [B or 1, S, D] in the dtype of q. Returns
    q [B, H, S, D] and k [B, G, S, D], laid out as transposed [B, S, heads, D]. D must be even.
    """
    check_heads(q, k, q_weight, k_weight, cos, sin, eps)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q_out = _rotate(rms_norm(q, q_weight, eps).transpose(1, 2), cos, sin)
    k_out = _rotate(rms_norm(k, k_weight, eps).transpose(1, 2), cos, sin)
    return q_out, k_out


QK_NORM_ROPE = Op(qk_norm_rope, check=check_heads)


def _accepts(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> str | None:
    return cpu.one_dtype(q, k, q_weight, k_weight, cos, sin) or cpu.last_dim_contiguous(
        q=q, k=k, q_weight=q_weight, k_weight=k_weight
    )


def _operands(tensors: Sequence[Any], q_out: Any, k_out: Any, eps: float) -> tuple[Any, ...]:
    q, k, _, _, cos, _ = tensors
    batch, seq, heads, dim = q.shape
    return (
        *(t.data_ptr() for t in (*tensors, q_out, k_out)),
        batch,
        seq,
        heads,
        k.shape[2],
        dim,
        *q.stride()[:3],
        *k.stride()[:3],
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(1),
        eps,
        cpu.code(q),
    )


def _record(
    steps: Steps, q: Array, k: Array, q_weight: Array, k_weight: Array, cos: Array, sin: Array, eps: float
) -> tuple[Array, Array]:
    need_contiguous(cos=cos, sin=sin)
    tensors = (q, k, q_weight, k_weight, cos, sin)
    q_out, k_out = steps.empty(q.static_shape(), q.dtype), steps.empty(k.static_shape(), q.dtype)
    steps.add("qk_norm_rope", _operands(tensors, q_out, k_out, eps), tensors, (q_out, k_out))
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


@QK_NORM_ROPE.provider("cpu", "cpu", available=cpu.available, accepts=_accepts, record=_record)
def qk_norm_rope_cpu(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    q_out, k_out = torch.empty(q.shape, dtype=q.dtype), torch.empty(k.shape, dtype=q.dtype)
    tensors = (q, k, q_weight, k_weight, cpu.as_rows(cos), cpu.as_rows(sin))
    cpu.lib().qk_norm_rope(*_operands(tensors, q_out, k_out, eps), cpu.threads())
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


QK_NORM_ROPE.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(by_triton.qk_norm_rope)


# Behind Triton, which is ahead or not by a measurement on a GPU; none was made yet.
register(QK_NORM_ROPE, cuda_kernels.accepts, cuda_kernels.qk_norm_rope)
