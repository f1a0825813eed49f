"""attention by the Triton kernels of paged_attention: the keys of a row are one page, and there is no block table."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.gpu import one_device
from qwenopt.ops.triton import DTYPES, dtypes, one_dtype, unit_strides
from qwenopt.ops.triton import paged_attention as paged


def accepts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_positions: Tensor | None, is_causal: bool, scale: float
) -> str | None:
    return (
        paged.heads(q, k)
        or one_device(q=q, k=k, v=v, mask=mask, q_positions=q_positions)
        or one_dtype(q=q, k=k, v=v)
        or dtypes((*DTYPES, torch.bool), mask=mask)
        or dtypes((torch.int64,), q_positions=q_positions)
        or unit_strides(q=q, k=k, v=v, q_positions=q_positions)
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_positions: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    return planned_attention(paged.device_of(q), q, k, v, mask, q_positions, is_causal, scale)


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
    if not q.numel() or not k.numel():
        return paged.output(q).zero_()
    if k.stride() != v.stride():  # without a cache: the keys come from a rotation, the values from a view
        k, v = k.contiguous(), v.contiguous()
    positions = _positions(q, q_positions, is_causal)
    return paged.planned_attention(device, q, k, v, None, None, None, None, positions, mask, 0, scale)
