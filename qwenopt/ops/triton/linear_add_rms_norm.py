"""linear_add_rms_norm by linear's and add_rms_norm's Triton kernels.

Where linear cuts K into parts, the norm adds them up: what would be a kernel of its own between the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.triton import add_rms_norm, linear, row_stride


def accepts(x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float) -> str | None:
    return linear.accepts(x, weight, None) or add_rms_norm.accepts(residual, residual, norm_weight, eps)


def linear_add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    return planned_linear_add_rms_norm(num_sms, x, weight, residual, norm_weight, eps)


def planned_linear_add_rms_norm(
    num_sms: int, x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`linear_add_rms_norm` as it is run on a device of so many multiprocessors."""
    parts = linear.planned_parts(num_sms, x, weight)
    if parts is None:
        product = linear.planned_linear(num_sms, x, weight, None)
        return add_rms_norm.add_rms_norm(product, residual, norm_weight, eps)
    from qwenopt.triton_kernels.add_rms_norm import launch_parts

    out, total = (torch.empty(residual.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    with torch.cuda.device_of(x):
        launch_parts(parts, residual, norm_weight, out, total, row_stride(residual) or 0, eps)
    return out, total
