"""kv_append: write new keys and values into their places in a pool of pages (Kwon et al., arXiv 2309.06180)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwenopt.ops import cpu, triton
from qwenopt.ops.cuda import kv_append as cuda_kernels
from qwenopt.ops.cuda.providers import register
from qwenopt.ops.op import Op
from qwenopt.ops.steps import Array, Steps
from qwenopt.ops.triton import kv_append as by_triton

# An int8 pool keeps one float32 scale for each token and head: `value = code * scale`, codes -127..127.
INT8_MAX = 127
POOL_CODES = {**cpu.DTYPE_CODES, torch.int8: 3}


def check_pools(op: str, k_pool: Tensor, v_pool: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Raise unless these are the two pools of one layer, with scales exactly when they hold int8."""
    torch._check(
        k_pool.dim() == 4 and k_pool.shape == v_pool.shape and k_pool.dtype == v_pool.dtype,
        lambda: (
            f"{op}: k_pool {tuple(k_pool.shape)} {k_pool.dtype} and v_pool {tuple(v_pool.shape)} {v_pool.dtype}; "
            "need (pages, G, page_size, D) twice in one dtype"
        ),
    )
    scales = [s for s in (k_scale, v_scale) if s is not None]
    torch._check(
        len(scales) == (2 if k_pool.dtype == torch.int8 else 0),
        lambda: f"{op}: {len(scales)} scales for pools of {k_pool.dtype}; int8 pools have two, others none",
    )
    for scale in scales:
        torch._check(
            scale.shape == k_pool.shape[:3] and scale.dtype == torch.float32,
            lambda scale=scale: (
                f"{op}: scale {tuple(scale.shape)} {scale.dtype}; "
                f"need (pages, G, page_size) = {tuple(k_pool.shape[:3])} torch.float32"
            ),
        )


def check_append(
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
) -> None:
    """Raise unless pools, scales, what is to be written and its slots fit together."""
    check_pools("kv_append", k_pool, v_pool, k_scale, v_scale)
    torch._check(
        k.dim() == 4 and k.shape == v.shape and k.shape[1] == k_pool.shape[1] and k.shape[3] == k_pool.shape[3],
        lambda: (
            f"kv_append: k {tuple(k.shape)} and v {tuple(v.shape)}; need (B, G, S, D) twice "
            f"with G = {k_pool.shape[1]} and D = {k_pool.shape[3]}"
        ),
    )
    torch._check(
        slots.dim() == 1 and slots.shape[0] == k.shape[0] * k.shape[2] and slots.dtype == torch.int64,
        lambda: (
            f"kv_append: slots {tuple(slots.shape)} {slots.dtype}; need one torch.int64 for each token, "
            f"({k.shape[0] * k.shape[2]},)"
        ),
    )


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., D] and scales float32 [...] of `x` [..., D]: `largest / 127` for each token and head."""
    largest = x.float().abs().amax(-1)
    inverse = torch.where(largest > 0, INT8_MAX / largest, 0.0)
    return torch.round(x.float() * inverse[..., None]).to(torch.int8), largest / INT8_MAX


def kv_append(
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
) -> None:
    """Write each token's keys and values to its slot: `pool[slot // page_size, :, slot % page_size] = k[b, :, s]`.

    k_pool and v_pool [pages, G, page_size, D], written to; k_scale and v_scale float32 [pages, G, page_size], also
    written to, exactly where the pools are int8. k and v [B, G, S, D]; slots int64 [B * S], one for each token in the
    order of `b * S + s`; a negative slot writes nothing; no two may be the same.
    """
    check_append(k_pool, v_pool, k_scale, v_scale, k, v, slots)
    keep = slots >= 0
    pages, places = slots[keep] // k_pool.shape[2], slots[keep] % k_pool.shape[2]
    for pool, scale, x in ((k_pool, k_scale, k), (v_pool, v_scale, v)):
        tokens = x.transpose(1, 2).flatten(0, 1)[keep]
        if scale is None:
            pool[pages, :, places] = tokens.to(pool.dtype)
        else:
            codes, scales = quantize_tokens(tokens)
            pool[pages, :, places] = codes
            scale[pages, :, places] = scales


KV_APPEND = Op(
    kv_append, check=check_append, fake=check_append, opaque=True, mutates=("k_pool", "v_pool", "k_scale", "v_scale")
)


def pools_fit(k_pool: Tensor, v_pool: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> str | None:
    """None when the kernels can read and write these pools, else the reason."""
    if k_pool.dtype not in POOL_CODES:
        return f"pools of {k_pool.dtype} (kernels: float32, bfloat16, float16, int8)"
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    return cpu.last_dim_contiguous(k_pool=k_pool, v_pool=v_pool) or cpu.contiguous(
        **{name: scale for name, scale in scales.items() if scale is not None}
    )


def _accepts(
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
) -> str | None:
    return (
        pools_fit(k_pool, v_pool, k_scale, v_scale)
        or cpu.one_dtype(k, v)
        or cpu.last_dim_contiguous(k=k, v=v)
        or cpu.contiguous(slots=slots)
    )


def _operands(k_pool: Any, v_pool: Any, k_scale: Any, v_scale: Any, k: Any, v: Any, slots: Any) -> tuple[Any, ...]:
    batch, groups, seq, dim = k.shape
    return (
        *(0 if t is None else t.data_ptr() for t in (k_pool, v_pool, k_scale, v_scale, k, v, slots)),
        batch,
        groups,
        seq,
        dim,
        k_pool.shape[0],
        k_pool.shape[2],
        *(stride for t in (k_pool, v_pool, k, v) for stride in t.stride()[:3]),
        POOL_CODES[k_pool.dtype],
        cpu.code(k),
    )


def _record(
    steps: Steps,
    k_pool: Array,
    v_pool: Array,
    k_scale: Array | None,
    v_scale: Array | None,
    k: Array,
    v: Array,
    slots: Array,
) -> None:
    written = [t for t in (k_pool, v_pool, k_scale, v_scale) if t is not None]
    steps.add("kv_append", _operands(k_pool, v_pool, k_scale, v_scale, k, v, slots), (k, v, slots), written)


@KV_APPEND.provider("cpu", "cpu", available=cpu.available, accepts=_accepts, record=_record)
def kv_append_cpu(
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
) -> None:
    cpu.lib().kv_append(*_operands(k_pool, v_pool, k_scale, v_scale, k, v, slots), cpu.threads())


KV_APPEND.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(by_triton.kv_append)


# Behind Triton, which is ahead or not by a measurement on a GPU; none was made yet.
register(KV_APPEND, cuda_kernels.accepts, cuda_kernels.kv_append)
