"""The Triton providers: what their kernels take, and the memory that a call needs. The first call loads Triton."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)
MAX_HEAD_DIM = 256
MAX_HEAD_DIM_FLOAT32_INT8 = 128  # above it the compiler spills hundreds of registers
MAX_GROUP = 16


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def available() -> str | None:
    """None when Triton is installed and there is a GPU that its kernels are written for, else why not."""
    if not _installed():
        return "triton is not installed (pip install qwenopt[triton])"
    if not torch.cuda.is_available():
        return "no CUDA device; torch.cuda.is_available() is False"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}; the kernels need 8.0 or newer"
    return None


def _one_device(**tensors: Tensor | None) -> str | None:
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        return "tensors on several devices: " + ", ".join(f"{name} on {device}" for name, device in devices.items())
    return None


def _unit_strides(**tensors: Tensor | None) -> str | None:
    for name, t in tensors.items():
        if t is not None and t.shape[-1] != 1 and t.stride(-1) != 1:
            return f"{name} has stride {t.stride(-1)} in its last dimension"
    return None


def _dtypes(dtypes: tuple[torch.dtype, ...], **tensors: Tensor | None) -> str | None:
    for name, t in tensors.items():
        if t is not None and t.dtype not in dtypes:
            return f"{name} has dtype {t.dtype} (kernels: {', '.join(str(d).removeprefix('torch.') for d in dtypes)})"
    return None


def _one_layout(a: Tensor | None, b: Tensor | None, names: str) -> str | None:
    if a is not None and b is not None and a.stride() != b.stride():
        return f"{names} have strides {a.stride()} and {b.stride()}"
    return None


def accepts_kv_append(
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
) -> str | None:
    return (
        _one_device(k_pool=k_pool, v_pool=v_pool, k_scale=k_scale, v_scale=v_scale, k=k, v=v, slots=slots)
        or _dtypes((*DTYPES, torch.int8), k_pool=k_pool)
        or _dtypes(DTYPES, k=k, v=v)
        or _unit_strides(k_pool=k_pool, v_pool=v_pool, k=k, v=v, slots=slots)
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


def accepts_paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    q_starts: Tensor | None,
    q_positions: Tensor | None,
    mask: Tensor | None,
    window: int,
    scale: float,
) -> str | None:
    head_dim, group = q.shape[3], q.shape[1] // k_pool.shape[1]
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} (the kernel has up to {MAX_HEAD_DIM})"
    if group > MAX_GROUP:
        return f"{group} query heads for each key/value head (the kernel has up to {MAX_GROUP})"
    if q.dtype == torch.float32 and k_pool.dtype == torch.int8 and head_dim > MAX_HEAD_DIM_FLOAT32_INT8:
        return f"head_dim {head_dim} of float32 over int8 pools (the kernel has up to {MAX_HEAD_DIM_FLOAT32_INT8})"
    pools = {"k_pool": k_pool, "v_pool": v_pool, "k_scale": k_scale, "v_scale": v_scale}
    others = {"block_table": block_table, "q_starts": q_starts, "q_positions": q_positions}
    return (
        _one_device(q=q, **pools, **others, mask=mask)
        or _dtypes(DTYPES, q=q)
        or _dtypes((*DTYPES, torch.bool), mask=mask)
        or _unit_strides(q=q, k_pool=k_pool, v_pool=v_pool, **others)
        or _one_layout(k_pool, v_pool, "k_pool and v_pool")
        or _one_layout(k_scale, v_scale, "k_scale and v_scale")
    )


def paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    q_starts: Tensor | None,
    q_positions: Tensor | None,
    mask: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    properties = torch.cuda.get_device_properties(q.device)
    device = (properties.multi_processor_count, properties.major)
    return planned_attention(
        device, q, k_pool, v_pool, k_scale, v_scale, block_table, q_starts, q_positions, mask, window, scale
    )


def planned_attention(
    device: tuple[int, int],
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    q_starts: Tensor | None,
    q_positions: Tensor | None,
    mask: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    """`paged_attention` as it is run on a device of so many multiprocessors and that major compute capability."""
    from qwenopt.triton_kernels.paged_attention import Device, launch, plan, workspace

    batch, heads, seq, dim = q.shape
    out = torch.empty(batch, seq, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    if not out.numel():
        return out
    rows, num_keys = block_table.shape[0], block_table.shape[1] * k_pool.shape[2]
    p = plan(q, k_pool.shape[1], rows, q_starts is not None, Device(*device))
    num_floats, num_ints = workspace(p, dim)
    floats = torch.empty(num_floats, dtype=torch.float32, device=q.device)
    ints = torch.empty(num_ints, dtype=torch.int32, device=q.device)
    if mask is not None:
        mask = mask.expand(batch, heads, seq, num_keys)
    if q_positions is None:
        window = 0  # it counts back from a position
    pools = (k_pool, v_pool, k_scale, v_scale)
    with torch.cuda.device_of(q):
        launch(p, q, *pools, block_table, q_starts, q_positions, mask, window, scale, out, floats, ints)
    return out
