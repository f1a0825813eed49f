"""moe_route by the Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.triton import DTYPES, dtypes, unit_strides

MAX_EXPERTS = 1024


def accepts(logits: Tensor, top_k: int, norm_topk_prob: bool) -> str | None:
    if logits.shape[1] > MAX_EXPERTS:
        return f"{logits.shape[1]} experts (the kernel has up to {MAX_EXPERTS})"
    return dtypes(DTYPES, logits=logits) or unit_strides(logits=logits)


def moe_route(logits: Tensor, top_k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    from qwenopt.triton_kernels.moe_route import launch

    shape = (logits.shape[0], top_k)
    weights = torch.empty(shape, dtype=logits.dtype, device=logits.device)
    indices = torch.empty(shape, dtype=torch.int64, device=logits.device)
    if weights.numel():
        with torch.cuda.device_of(logits):
            launch(logits, weights, indices, norm_topk_prob)
    return weights, indices
