"""kv_append by the Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.gpu import one_device
from qwenopt.ops.triton import DTYPES, dtypes, unit_strides


def accepts(
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
) -> str | None:
    return (
        one_device(k_pool=k_pool, v_pool=v_pool, k_scale=k_scale, v_scale=v_scale, k=k, v=v, slots=slots)
        or dtypes((*DTYPES, torch.int8), k_pool=k_pool)
        or dtypes(DTYPES, k=k, v=v)
        or unit_strides(k_pool=k_pool, v_pool=v_pool, k=k, v=v, slots=slots)
    )


def kv_append(
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
) -> None:
    from qwenopt.triton_kernels.kv_append import launch

    if slots.numel():
        with torch.cuda.device_of(k):
            launch(k_pool, v_pool, k_scale, v_scale, k, v, slots)
