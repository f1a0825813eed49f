"""kv_append on a GPU: a warp for each token and head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwenopt.ops import cpu
from qwenopt.ops.cuda import DTYPES
from qwenopt.ops.cuda.launch import WARP, Launch, Run, dtype_name, pack

THREADS = 128
MAX_HEAD_DIM = 256
POOL_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}


def pools_fit(k_pool: Tensor, v_pool: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> str | None:
    """None when the kernels can read and write these pools, else the reason."""
    if k_pool.dtype not in POOL_NAMES:
        return f"pools of {k_pool.dtype} (kernels: float32, bfloat16, int8)"
    scales = {name: s for name, s in (("k_scale", k_scale), ("v_scale", v_scale)) if s is not None}
    return cpu.last_dim_contiguous(k_pool=k_pool, v_pool=v_pool) or cpu.contiguous(**scales)


def accepts(
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
) -> str | None:
    if k.shape[3] > MAX_HEAD_DIM:
        return f"head_dim {k.shape[3]} (the kernel has up to {MAX_HEAD_DIM})"
    return (
        pools_fit(k_pool, v_pool, k_scale, v_scale)
        or cpu.one_dtype(k, v, among=DTYPES)
        or cpu.last_dim_contiguous(k=k, v=v)
        or cpu.contiguous(slots=slots)
    )


def args_of(
    k_pool: Tensor, v_pool: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, k: Any, v: Tensor, slots: Tensor
) -> bytes:
    """The struct KvAppendArgs; `k` may be None."""
    batch, groups, seq, dim = v.shape
    return pack(
        *(k_pool, v_pool, k_scale, v_scale, k, v, slots),
        *(batch, groups, seq, dim, k_pool.shape[0], k_pool.shape[2]),
        *(stride for t in (k_pool, v_pool, v if k is None else k, v) for stride in t.stride()[:3]),
    )


def kv_append(
    run: Run,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
) -> None:
    items = slots.shape[0] * k.shape[1]
    if items and k.shape[3]:
        name = f"kv_append_{dtype_name(k)}_{POOL_NAMES[k_pool.dtype]}"
        args = args_of(k_pool, v_pool, k_scale, v_scale, k, v, slots)
        run(Launch(name, (-(-items * WARP // THREADS), 1, 1), THREADS, args))
