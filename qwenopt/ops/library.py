"""The provider `torch`: operations for which torch's own libraries on a GPU (cuBLAS, flash attention) are the kernel.

Behind the other providers, which call the same functions for sizes that are not theirs. It takes what they do not, and
serves where Triton is not installed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops.gpu import no_device, one_device

available = no_device


def accepts_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """None when cuBLAS has this product, else the reason."""
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    if len(dtypes) > 1:
        return "mixed dtypes " + ", ".join(sorted(map(str, dtypes)))
    return one_device(x=x, weight=weight, bias=bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def accepts_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_positions: Tensor | None, is_causal: bool, scale: float
) -> str | None:
    """None when scaled_dot_product_attention says all of this itself, else the reason."""
    if mask is not None or q_positions is not None:
        return "a mask or positions, for which all keys of a cache would be read"
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        return f"mixed dtypes {q.dtype}, {k.dtype}, {v.dtype}"
    return one_device(q=q, k=k, v=v)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_positions: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    grouped: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, **grouped)
    return as_reference(out)


def as_reference(out: Tensor) -> Tensor:
    """`out` [B, H, S, D] laid out as the reference has it: the heads of a token side by side. Flash attention does."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


__all__ = ["accepts_attention", "accepts_linear", "attention", "available", "linear"]
