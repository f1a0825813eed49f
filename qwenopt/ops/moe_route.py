"""moe_route: router logits to the top-k experts of each token and their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwenopt.ops import cpu, triton
from qwenopt.ops.op import Op
from qwenopt.ops.steps import Array, Steps, need_contiguous
from qwenopt.ops.triton import moe_route as by_triton


def _check(logits: Tensor, top_k: int, norm_topk_prob: bool) -> None:
    torch._check(
        logits.dim() == 2 and 0 < top_k <= logits.shape[1],
        lambda: f"moe_route: logits {tuple(logits.shape)}, top_k {top_k}; logits must be (T, E) with E >= top_k >= 1",
    )


def moe_route(logits: Tensor, top_k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """Softmax `logits` [T, E] in float32 and keep the `top_k` largest of each row.

    Returns `(weights, indices)`: weights [T, K] in `logits.dtype`, divided by their sum before the cast if
    `norm_topk_prob`; indices [T, K] int64, largest weight first.
    """
    _check(logits, top_k, norm_topk_prob)
    probs = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, indices = torch.topk(probs, top_k, dim=-1)
    if norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype), indices


MOE_ROUTE = Op(moe_route, check=_check)


def _accepts(logits: Tensor, top_k: int, norm_topk_prob: bool) -> str | None:
    return cpu.one_dtype(logits) or cpu.contiguous(logits=logits)


def _operands(logits: Any, weights: Any, indices: Any, norm_topk_prob: bool) -> tuple[Any, ...]:
    tokens, experts = logits.shape
    addresses = (logits.data_ptr(), weights.data_ptr(), indices.data_ptr())
    return (*addresses, tokens, experts, weights.shape[1], experts, norm_topk_prob, cpu.code(logits))


def _record(steps: Steps, logits: Array, top_k: int, norm_topk_prob: bool) -> tuple[Array, Array]:
    need_contiguous(logits=logits)
    shape = (logits.static_shape()[0], top_k)
    weights, indices = steps.empty(shape, logits.dtype), steps.empty(shape, torch.int64)
    steps.add("moe_route", _operands(logits, weights, indices, norm_topk_prob), (logits,), (weights, indices))
    return weights, indices


@MOE_ROUTE.provider("cpu", "cpu", available=cpu.available, accepts=_accepts, record=_record)
def moe_route_cpu(logits: Tensor, top_k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    logits = cpu.as_rows(logits)
    weights = logits.new_empty((logits.shape[0], top_k))
    indices = torch.empty((logits.shape[0], top_k), dtype=torch.int64)
    cpu.lib().moe_route(*_operands(logits, weights, indices, norm_topk_prob), cpu.threads())
    return weights, indices


MOE_ROUTE.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(by_triton.moe_route)
