"""qk_norm_rope by the Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.gpu import one_device
from qwenopt.ops.triton import one_dtype, unit_strides

MAX_HEAD_DIM = 256


def accepts(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> str | None:
    if q.shape[3] > MAX_HEAD_DIM:
        return f"head_dim {q.shape[3]} (the kernel has up to {MAX_HEAD_DIM})"
    tensors = {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin}
    return one_device(**tensors) or one_dtype(**tensors) or unit_strides(**tensors)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from qwenopt.triton_kernels.qk_norm_rope import launch

    q_out, k_out = (torch.empty(x.shape, dtype=q.dtype, device=q.device) for x in (q, k))
    if q_out.numel() or k_out.numel():
        with torch.cuda.device_of(q):
            launch(q, k, q_weight, k_weight, cos, sin, q_out, k_out, eps)
    return q_out.transpose(1, 2), k_out.transpose(1, 2)
