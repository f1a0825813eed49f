"""What the CPU providers share: availability, argument checks and the numbers that a native call needs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from qwenopt import native

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def available() -> str | None:
    """None when the native extension can be called, else why not."""
    return native.why_not()


def one_dtype(*tensors: Tensor | None, among: Collection[torch.dtype] = DTYPE_CODES) -> str | None:
    """None when all tensors share one dtype that the kernels have (`among`), else the reason."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) != 1:
        return "mixed dtypes " + ", ".join(sorted(map(str, dtypes)))
    (dtype,) = dtypes
    names = ", ".join(str(d).removeprefix("torch.") for d in among)
    return None if dtype in among else f"dtype {dtype} (kernels: {names})"


def last_dim_contiguous(**tensors: Tensor) -> str | None:
    """None when every tensor has unit stride in its last dimension, else the reason."""
    for name, t in tensors.items():
        if t.shape[-1] != 1 and t.stride(-1) != 1:
            return f"{name} has stride {t.stride(-1)} in its last dimension"
    return None


def contiguous(**tensors: Tensor) -> str | None:
    """None when every tensor is contiguous, else the reason."""
    for name, t in tensors.items():
        if not t.is_contiguous():
            return f"{name} is not contiguous"
    return None


def as_rows(x: Tensor) -> Tensor:
    """`x` with rows of one stride: itself when contiguous, else a copy."""
    return x if x.is_contiguous() else x.contiguous()


def row_stride(x: Any) -> Any:
    """The distance in elements between neighbouring rows (vectors of the last dimension), or None if it is not one."""
    if x.is_contiguous():
        return x.shape[-1]
    outer = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    unit = x.stride(-1) == 1 or x.shape[-1] == 1
    return outer[0][1] if unit and len(outer) == 1 and outer[0][1] >= x.shape[-1] else None


def code(t: Any) -> int:
    """The native dtype code of a tensor, or of what stands for one in a plan."""
    return DTYPE_CODES[t.dtype]


def lib() -> Any:
    """The native module."""
    return native.C()


def threads() -> int:
    """Threads for the next call: torch's own setting."""
    return torch.get_num_threads()
