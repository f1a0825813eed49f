"""linear_argmax: the likeliest token by lm_head, without logits. What linear and top_tokens are merged to on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops import triton
from qwenopt.ops.cuda import linear_argmax as cuda_kernels
from qwenopt.ops.cuda.providers import register
from qwenopt.ops.linear import check_linear
from qwenopt.ops.op import Op
from qwenopt.ops.triton import linear_argmax as by_triton


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_linear("linear_argmax", x, weight, bias)
    torch._check(
        0 < weight.shape[0] < 1 << 30,
        lambda: f"linear_argmax: weight {tuple(weight.shape)}; it must have 1 to 2**30 - 1 rows",
    )


def linear_argmax(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The place of the largest of each row of `x @ weight.T + bias`, after rounding to their dtype.

    x [..., K], R rows in all; weight [N, K]; bias [N] or None. Returns int64 [R, 1]. Of equal ones the first; NaN is
    larger than all numbers and 0 equals -0, as in `top_tokens`.
    """
    _check(x, weight, bias)
    return F.linear(x, weight, bias).reshape(-1, weight.shape[0]).argmax(-1, keepdim=True)


LINEAR_ARGMAX = Op(linear_argmax, check=_check)


LINEAR_ARGMAX.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(by_triton.linear_argmax)


register(LINEAR_ARGMAX, cuda_kernels.accepts, cuda_kernels.linear_argmax)
