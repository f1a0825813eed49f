"""The Triton providers, a module for each op: what its kernel takes, and the memory that a call needs.

Here is what they share. The first call loads Triton.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools

import torch
from torch import Tensor

from qwenopt.ops.gpu import no_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def available() -> str | None:
    """None when Triton is installed and there is a GPU that its kernels are written for, else why not."""
    if not _installed():
        return "triton is not installed (pip install qwenopt[triton])"
    return no_device()


def unit_strides(**tensors: Tensor | None) -> str | None:
    """None when every tensor has unit stride in its last dimension, else the reason."""
    for name, t in tensors.items():
        if t is not None and t.shape[-1] != 1 and t.stride(-1) != 1:
            return f"{name} has stride {t.stride(-1)} in its last dimension"
    return None


def dtypes(allowed: tuple[torch.dtype, ...], **tensors: Tensor | None) -> str | None:
    """None when every tensor has one of `allowed`, else the reason."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in allowed:
            return f"{name} has dtype {t.dtype} (kernels: {', '.join(str(d).removeprefix('torch.') for d in allowed)})"
    return None


def one_layout(a: Tensor | None, b: Tensor | None, names: str) -> str | None:
    """None when both tensors have the same strides, else both."""
    if a is not None and b is not None and a.stride() != b.stride():
        return f"{names} have strides {a.stride()} and {b.stride()}"
    return None


def one_dtype(**tensors: Tensor | None) -> str | None:
    """None when all tensors share one dtype that the kernels have, else the reason."""
    if len(found := {str(t.dtype) for t in tensors.values() if t is not None}) > 1:
        return "mixed dtypes " + ", ".join(sorted(found))
    return dtypes(DTYPES, **tensors)


def row_stride(x: Tensor) -> int | None:
    """The distance in elements between neighbouring rows (vectors of the last dimension), None if they have no one."""
    if x.shape[-1] != 1 and x.stride(-1) != 1:
        return None
    outer = [(size, x.stride(i)) for i, size in enumerate(x.shape[:-1]) if size != 1]
    for (_, stride), (size, inner) in itertools.pairwise(outer):
        if stride != size * inner:
            return None
    return outer[-1][1] if outer else x.shape[-1]


def rows(**tensors: Tensor) -> str | None:
    """None when the rows of every tensor are evenly spaced, else the reason."""
    for name, t in tensors.items():
        if t.dim() == 0 or (t.numel() and row_stride(t) is None):
            return f"{name} {tuple(t.shape)} with strides {t.stride()} is no evenly spaced rows"
    return None
