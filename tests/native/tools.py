"""Small tools for the tests of the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def code(dtype: torch.dtype) -> int:
    """The dtype code of the native ABI."""
    return {torch.float32: 0, torch.bfloat16: 1}[dtype]


def randn(*shape: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Normal numbers; with an offset the data starts that many elements past an aligned address."""
    count = 1
    for size in shape:
        count *= size
    flat = torch.randn(count + offset).to(dtype)
    return flat[offset:].view(shape)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the spacing of numbers next to one."""
    return torch.finfo(dtype).eps / 2


def assert_dot_close(actual: Tensor, exact: Tensor, magnitude: Tensor, length: int, roundings: int = 1) -> None:
    """`actual` is a sum of `length` products, accumulated in fp32 and rounded `roundings` times to its dtype.

    |error| <= length * u32 * sum|products| (any order of summation; twice, as products may be rounded too)
    + roundings * u * |value|. `magnitude` is sum|products|.
    """
    bound = 2 * (length + 4) * unit_roundoff(torch.float32) * magnitude.double()
    bound = bound + roundings * unit_roundoff(actual.dtype) * (exact.abs() + bound) * 1.01 + 1e-30
    error = (actual.double() - exact).abs()
    worst = (error / bound).max().item() if error.numel() else 0.0
    assert worst <= 1, f"error is {worst:.2f} times what {actual.dtype} and {length} terms allow"


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Equal to the last bit."""
    kind = {4: torch.int32, 2: torch.int16}[a.element_size()]
    assert torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
