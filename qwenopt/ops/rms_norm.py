"""rms_norm: `weight * cast(x / rms(x))`, the norm of Qwen3 (Zhang and Sennrich, 2019, arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwenopt.ops import cpu, triton
from qwenopt.ops.op import Op
from qwenopt.ops.steps import Array, Steps, need_contiguous
from qwenopt.ops.triton import rms_norm as by_triton


def check_norm(op: str, x: Tensor, weight: Tensor) -> None:
    """Raise unless `weight` is one vector as long as the last dimension of `x`, which must not be empty."""
    torch._check(x.dim() >= 1, lambda: f"{op}: x is a scalar; it must have a last dimension to norm")
    torch._check(
        weight.dim() == 1 and x.shape[-1] == weight.shape[0] and weight.shape[0] > 0,
        lambda: (
            f"{op}: x {tuple(x.shape)} and weight {tuple(weight.shape)}; weight must be ({x.shape[-1]},), not empty"
        ),
    )


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    check_norm("rms_norm", x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide the last dimension of `x` [..., N] by its root mean square in float32, cast, scale by `weight` [N].

    The cast to `x.dtype` comes before the product with `weight`, as in transformers' `Qwen3RMSNorm`.
    """
    _check(x, weight, eps)
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


RMS_NORM = Op(rms_norm, check=_check)


def _accepts(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return cpu.one_dtype(x, weight) or cpu.contiguous(x=x, weight=weight)


def _operands(x: Any, weight: Any, out: Any, eps: float) -> tuple[Any, ...]:
    cols = x.shape[-1]
    addresses = (x.data_ptr(), weight.data_ptr(), out.data_ptr())
    return (*addresses, x.numel() // cols, cols, cols, eps, cpu.code(x))


def _record(steps: Steps, x: Array, weight: Array, eps: float) -> Array:
    need_contiguous(x=x)
    out = steps.empty(x.shape, x.dtype)
    steps.add("rms_norm", _operands(x, weight, out, eps), (x, weight), (out,))
    return out


@RMS_NORM.provider("cpu", "cpu", available=cpu.available, accepts=_accepts, record=_record)
def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = cpu.as_rows(x)
    out = torch.empty_like(x)
    cpu.lib().rms_norm(*_operands(x, weight, out, eps), cpu.threads())
    return out


RMS_NORM.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(by_triton.rms_norm)
