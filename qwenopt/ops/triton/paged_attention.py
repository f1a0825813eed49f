"""paged_attention by the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.gpu import one_device
from qwenopt.ops.triton import DTYPES, dtypes, one_layout, unit_strides

MAX_HEAD_DIM = 256
MAX_HEAD_DIM_FLOAT32_INT8 = 128  # above it the compiler spills hundreds of registers
MAX_GROUP = 16


def heads(q: Tensor, k: Tensor) -> str | None:
    """None when the kernels have this size and grouping of heads, else the reason."""
    head_dim, group = q.shape[3], q.shape[1] // k.shape[1]
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} (the kernel has up to {MAX_HEAD_DIM})"
    if group > MAX_GROUP:
        return f"{group} query heads for each key/value head (the kernel has up to {MAX_GROUP})"
    return None


def accepts(
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
    head_dim = q.shape[3]
    if q.dtype == torch.float32 and k_pool.dtype == torch.int8 and head_dim > MAX_HEAD_DIM_FLOAT32_INT8:
        return f"head_dim {head_dim} of float32 over int8 pools (the kernel has up to {MAX_HEAD_DIM_FLOAT32_INT8})"
    pools = {"k_pool": k_pool, "v_pool": v_pool, "k_scale": k_scale, "v_scale": v_scale}
    others = {"block_table": block_table, "q_starts": q_starts, "q_positions": q_positions}
    return (
        heads(q, k_pool)
        or one_device(q=q, **pools, **others, mask=mask)
        or dtypes(DTYPES, q=q)
        or dtypes((*DTYPES, torch.bool), mask=mask)
        or unit_strides(q=q, k_pool=k_pool, v_pool=v_pool, **others)
        or one_layout(k_pool, v_pool, "k_pool and v_pool")
        or one_layout(k_scale, v_scale, "k_scale and v_scale")
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
    return planned_attention(
        device_of(q), q, k_pool, v_pool, k_scale, v_scale, block_table, q_starts, q_positions, mask, window, scale
    )


def device_of(q: Tensor) -> tuple[int, int]:
    """Multiprocessors and major compute capability of the device that a tensor is on."""
    properties = torch.cuda.get_device_properties(q.device)
    return properties.multi_processor_count, properties.major


def output(q: Tensor) -> Tensor:
    """Memory of q's shape, the heads of a token side by side: what the output projection reads."""
    batch, heads, seq, dim = q.shape
    return torch.empty(batch, seq, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)


def planned_attention(
    device: tuple[int, int],
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor | None,
    q_starts: Tensor | None,
    q_positions: Tensor | None,
    mask: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    """`paged_attention` as it is run on a device of so many multiprocessors and that major compute capability.

    Without a block table each batch entry has its keys in one piece: the pools are [B, G, L, D].
    """
    from qwenopt.triton_kernels.paged_attention import Device, launch, plan, workspace

    out = output(q)
    if not out.numel():
        return out
    rows, pages = (q.shape[0], 1) if block_table is None else block_table.shape
    p = plan(q, k_pool.shape[1], rows, q_starts is not None, Device(*device))
    num_floats, num_ints = workspace(p, q.shape[3])
    floats = torch.empty(num_floats, dtype=torch.float32, device=q.device)
    ints = torch.empty(num_ints, dtype=torch.int32, device=q.device)
    if mask is not None:
        mask = mask.expand(*q.shape[:3], pages * k_pool.shape[2])
    if q_positions is None:
        window = 0  # it counts back from a position
    pools = (k_pool, v_pool, k_scale, v_scale)
    with torch.cuda.device_of(q):
        launch(p, q, *pools, block_table, q_starts, q_positions, mask, window, scale, out, floats, ints)
    return out
