"""attention by the Triton kernels of paged_attention: the keys of a row are one page, and there is no block table."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.triton import DTYPES, dtypes, one_device, unit_strides
from qwenopt.ops.triton.paged_attention import MAX_GROUP, MAX_HEAD_DIM


def accepts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_positions: Tensor | None, is_causal: bool, scale: float
) -> str | None:
    head_dim, group = q.shape[3], q.shape[1] // k.shape[1]
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} (the kernel has up to {MAX_HEAD_DIM})"
    if group > MAX_GROUP:
        return f"{group} query heads for each key/value head (the kernel has up to {MAX_GROUP})"
    if len(found := {str(t.dtype) for t in (q, k, v)}) > 1:
        return "mixed dtypes " + ", ".join(sorted(found))
    return (
        one_device(q=q, k=k, v=v, mask=mask, q_positions=q_positions)
        or dtypes(DTYPES, q=q)
        or dtypes((*DTYPES, torch.bool), mask=mask)
        or dtypes((torch.int64,), q_positions=q_positions)
        or unit_strides(q=q, k=k, v=v, q_positions=q_positions)
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_positions: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    properties = torch.cuda.get_device_properties(q.device)
    device = (properties.multi_processor_count, properties.major)
    return planned_attention(device, q, k, v, mask, q_positions, is_causal, scale)


def _positions(q: Tensor, q_positions: Tensor | None, is_causal: bool) -> Tensor | None:
    """The last key that each query sees; None: all keys."""
    if not is_causal:
        return q_positions
    own = torch.arange(q.shape[2], device=q.device)
    return own if q_positions is None else torch.minimum(own, q_positions)


def planned_attention(
    device: tuple[int, int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_positions: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """`attention` as it is run on a device of so many multiprocessors and that major compute capability."""
    from qwenopt.triton_kernels.paged_attention import Device, launch, plan, workspace

    batch, heads, seq, dim = q.shape
    out = torch.empty(batch, seq, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    if not out.numel() or not k.numel():
        return out.zero_()
    if k.stride() != v.stride():  # without a cache: the keys come from a rotation, the values from a view
        k, v = k.contiguous(), v.contiguous()
    p = plan(q, k.shape[1], batch, False, Device(*device))
    num_floats, num_ints = workspace(p, dim)
    floats = torch.empty(num_floats, dtype=torch.float32, device=q.device)
    ints = torch.empty(num_ints, dtype=torch.int32, device=q.device)
    if mask is not None:
        mask = mask.expand(batch, heads, seq, k.shape[2])
    positions = _positions(q, q_positions, is_causal)
    with torch.cuda.device_of(q):
        launch(p, q, k, v, None, None, None, None, positions, mask, 0, scale, out, floats, ints)
    return out
