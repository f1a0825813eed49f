"""linear_group: linear layers of one x, such as queries, keys and values. What raised ones are merged to on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops import triton
from qwenopt.ops.linear import check_weight
from qwenopt.ops.op import Op
from qwenopt.ops.triton import linear_group as by_triton


def _check(x: Tensor, weights: list[Tensor]) -> None:
    torch._check(len(weights) > 0, lambda: "linear_group: no weights")
    for weight in weights:
        check_weight("linear_group", x, weight)


def linear_group(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """`x` [..., K] times each weight [N, K] transposed; returns one [..., N] for each, in one dtype."""
    _check(x, weights)
    return [F.linear(x, weight) for weight in weights]


LINEAR_GROUP = Op(linear_group, check=_check)


LINEAR_GROUP.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(by_triton.linear_group)
