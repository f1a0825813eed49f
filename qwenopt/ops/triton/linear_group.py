"""linear_group by the Triton kernels where reading the weights is all there is to do, one by one for more rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops.gpu import one_device
from qwenopt.ops.triton import one_dtype, unit_strides
from qwenopt.ops.triton.linear import on_kernel, rows_of

NUM_WEIGHTS = (2, 3)


def accepts(x: Tensor, weights: list[Tensor]) -> str | None:
    if len(weights) not in NUM_WEIGHTS:
        return f"{len(weights)} weights (the kernel has 2 or 3)"
    named = {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    return one_device(x=x, **named) or one_dtype(x=x, **named) or unit_strides(**named)


def linear_group(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return planned_linear_group(torch.cuda.get_device_properties(x.device).multi_processor_count, x, weights)


def planned_linear_group(num_sms: int, x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """`linear_group` as it is run on a device of so many multiprocessors."""
    columns = [weight.shape[0] for weight in weights]
    if not (all(columns) and on_kernel(x)):
        return [F.linear(x, weight) for weight in weights]
    from qwenopt.triton_kernels.linear_group import launch, plan

    flat = rows_of(x)
    outs = [torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device) for n in columns]
    with torch.cuda.device_of(x):
        launch(plan(len(flat), sum(columns), num_sms), flat, weights, outs)
    return outs
