"""add_rms_norm: the residual sum and its rms_norm in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwenopt.ops import cpu, triton
from qwenopt.ops.op import Op
from qwenopt.ops.rms_norm import check_norm, rms_norm
from qwenopt.ops.steps import Array, Steps, need_contiguous
from qwenopt.ops.triton import add_rms_norm as by_triton


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


def _operands(x: Any, residual: Any, weight: Any, out: Any, total: Any, eps: float) -> tuple[Any, ...]:
    cols = x.shape[-1]
    addresses = tuple(t.data_ptr() for t in (x, residual, weight, out, total))
    return (*addresses, x.numel() // cols, cols, cols, cols, eps, cpu.code(x))


def _record(steps: Steps, x: Array, residual: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    need_contiguous(x=x, residual=residual)
    out, total = steps.empty(x.shape, x.dtype), steps.empty(x.shape, x.dtype)
    operands = _operands(x, residual, weight, out, total, eps)
    steps.add("add_rms_norm", operands, (x, residual, weight), (out, total))
    return out, total


@ADD_RMS_NORM.provider("cpu", "cpu", available=cpu.available, accepts=_accepts, record=_record)
def add_rms_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, residual = cpu.as_rows(x), cpu.as_rows(residual)
    out, total = torch.empty_like(x), torch.empty_like(x)
    cpu.lib().add_rms_norm(*_operands(x, residual, weight, out, total, eps), cpu.threads())
    return out, total


ADD_RMS_NORM.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(by_triton.add_rms_norm)
