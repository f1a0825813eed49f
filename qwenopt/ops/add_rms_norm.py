"""add_rms_norm: the residual sum and its rms_norm in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops import cpu
from qwenopt.ops.op import Op
from qwenopt.ops.rms_norm import check_norm, rms_norm


def _check(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    torch._check(
        x.shape == residual.shape,
        lambda: f"add_rms_norm: x {tuple(x.shape)} and residual {tuple(residual.shape)} must have one shape",
    )
    check_norm("add_rms_norm", x, weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(rms_norm(residual + x, weight, eps), residual + x)`; x and residual [..., N], weight [N], one dtype."""
    _check(x, residual, weight, eps)
    total = residual + x
    return rms_norm(total, weight, eps), total


ADD_RMS_NORM = Op(add_rms_norm, check=_check)


def _accepts(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> str | None:
    return cpu.one_dtype(x, residual, weight) or cpu.contiguous(x=x, residual=residual, weight=weight)


@ADD_RMS_NORM.provider("cpu", "cpu", available=cpu.available, accepts=_accepts)
def add_rms_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, residual = cpu.as_rows(x), cpu.as_rows(residual)
    out, total = torch.empty_like(x), torch.empty_like(x)
    cols = x.shape[-1]
    cpu.lib().add_rms_norm(
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        total.data_ptr(),
        x.numel() // cols,
        cols,
        cols,
        cols,
        eps,
        cpu.code(x),
        cpu.threads(),
    )
    return out, total
