"""attention by the Triton kernels of paged_attention: the keys of a row are one page, and there is no block table.

Many queries over exactly the keys that they need are torch's own ground (flash attention): a whole prompt without a
cache, or with one that grows. In a static cache, where attention must not read what is not there yet, they are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops import library
from qwenopt.ops.gpu import one_device
from qwenopt.ops.triton import DTYPES, dtypes, one_dtype, unit_strides
from qwenopt.ops.triton import paged_attention as paged

MAX_QUERIES = 16  # of one row, up to which reading keys is all there is to do


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
    if q.shape[2] > MAX_QUERIES and _is_torchs(q, k, mask, q_positions, is_causal):
        return library.attention(q, k, v, None, None, is_causal, scale)
    return planned_attention(paged.device_of(q), q, k, v, mask, q_positions, is_causal, scale)


def _is_torchs(q: Tensor, k: Tensor, mask: Tensor | None, q_positions: Tensor | None, is_causal: bool) -> bool:
    """Whether flash attention says it: no mask, no positions, and causal only from the first key on."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return half and mask is None and q_positions is None and (not is_causal or q.shape[2] == k.shape[2])


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
