"""linear_silu_mul: gate and up of a SwiGLU MLP in one. What two linear layers and a silu_mul are merged to on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops import triton
from qwenopt.ops.linear import check_weight
from qwenopt.ops.op import Op
from qwenopt.ops.silu_mul import silu_mul
from qwenopt.ops.triton import linear_silu_mul as by_triton


def _check(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> None:
    check_weight("linear_silu_mul", x, gate_weight)
    torch._check(
        gate_weight.shape == up_weight.shape,
        lambda: (
            f"linear_silu_mul: gate_weight {tuple(gate_weight.shape)} and up_weight {tuple(up_weight.shape)} must have "
            "one shape"
        ),
    )


def linear_silu_mul(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """`silu(x @ gate_weight.T) * (x @ up_weight.T)`; x [..., K], weights [N, K]; returns [..., N] in one dtype."""
    _check(x, gate_weight, up_weight)
    return silu_mul(F.linear(x, gate_weight), F.linear(x, up_weight))


LINEAR_SILU_MUL = Op(linear_silu_mul, check=_check)


LINEAR_SILU_MUL.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(
    by_triton.linear_silu_mul
)
