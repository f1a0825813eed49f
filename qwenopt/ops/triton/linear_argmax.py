"""linear_argmax by the Triton kernels where reading the weight is all there is to do, else from logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.triton import linear
from qwenopt.ops.triton.top_tokens import top_tokens

accepts = linear.accepts


def linear_argmax(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    return planned_linear_argmax(num_sms, x, weight, bias)


def planned_linear_argmax(num_sms: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_argmax` as it is run on a device of so many multiprocessors."""
    from qwenopt.triton_kernels.linear import plan
    from qwenopt.triton_kernels.linear_argmax import launch, num_parts

    n, k = weight.shape
    if linear.on_kernel(x):
        flat = linear.rows_of(x)
        p = plan(len(flat), n, k, num_sms)
        if p.splits < 2:  # so few columns that K is cut are not worth a kernel
            keys = torch.empty(len(flat), num_parts(p, n), dtype=torch.int64, device=x.device)
            ids = torch.empty(len(flat), 1, dtype=torch.int64, device=x.device)
            with torch.cuda.device_of(x):
                launch(p, flat, weight, bias, keys, ids)
            return ids
    logits = linear.planned_linear(num_sms, x, weight, bias).reshape(-1, n)
    return top_tokens(logits, 1)[1]
