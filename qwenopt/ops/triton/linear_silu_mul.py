"""linear_silu_mul by the Triton kernels where reading the weights is all there is to do; two products for more rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops.gpu import one_device
from qwenopt.ops.triton import one_dtype, unit_strides
from qwenopt.ops.triton.linear import on_kernel, rows_of
from qwenopt.ops.triton.silu_mul import silu_mul


def accepts(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> str | None:
    weights = {"gate_weight": gate_weight, "up_weight": up_weight}
    return one_device(x=x, **weights) or one_dtype(x=x, **weights) or unit_strides(**weights)


def linear_silu_mul(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    return planned_linear_silu_mul(num_sms, x, gate_weight, up_weight)


def planned_linear_silu_mul(num_sms: int, x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """`linear_silu_mul` as it is run on a device of so many multiprocessors."""
    n = gate_weight.shape[0]
    if not (n and on_kernel(x)):
        return silu_mul(F.linear(x, gate_weight), F.linear(x, up_weight))
    from qwenopt.triton_kernels.linear_silu_mul import launch, plan

    flat = rows_of(x)
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        launch(plan(len(flat), n, num_sms), flat, gate_weight, up_weight, out)
    return out
