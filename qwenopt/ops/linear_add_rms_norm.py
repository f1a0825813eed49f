"""linear_add_rms_norm: a linear layer, the residual sum behind it and its norm. What the two are merged to on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops import triton
from qwenopt.ops.add_rms_norm import add_rms_norm
from qwenopt.ops.linear import check_weight
from qwenopt.ops.op import Op
from qwenopt.ops.rms_norm import check_norm
from qwenopt.ops.triton import linear_add_rms_norm as by_triton


def _check(x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float) -> None:
    check_weight("linear_add_rms_norm", x, weight)
    torch._check(
        residual.shape == (*x.shape[:-1], weight.shape[0]),
        lambda: (
            f"linear_add_rms_norm: residual {tuple(residual.shape)} for x {tuple(x.shape)} and weight "
            f"{tuple(weight.shape)}; it must be {(*x.shape[:-1], weight.shape[0])}"
        ),
    )
    check_norm("linear_add_rms_norm", residual, norm_weight)


def linear_add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm(x @ weight.T, residual, norm_weight, eps)`.

    x [..., K], weight [N, K], residual [..., N], norm_weight [N], one dtype; returns the norm and the sum, [..., N].
    """
    _check(x, weight, residual, norm_weight, eps)
    return add_rms_norm(F.linear(x, weight), residual, norm_weight, eps)


LINEAR_ADD_RMS_NORM = Op(linear_add_rms_norm, check=_check)


LINEAR_ADD_RMS_NORM.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(
    by_triton.linear_add_rms_norm
)
