"""What rms_norm and add_rms_norm share: the norm of whole rows in registers, and how many of them a program takes."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# So many rows fill a device with a program for each; of more, a program takes several, each thread two vectors.
# Not tuned on a device.
FEW_ROWS = 2048
MANY_ELEMENTS = 4096


class Block(NamedTuple):
    """Rows and columns of a program, and its warps."""

    rows: int
    cols: int
    num_warps: int


def block(num_rows: int, num_cols: int) -> Block:
    """A thread has 8 numbers, 16 bytes of a 16-bit dtype, or 16 where a program has several rows."""
    cols = triton.next_power_of_2(num_cols)
    rows = 1 if num_rows <= FEW_ROWS else max(1, MANY_ELEMENTS // cols)
    per_thread = 8 if num_rows <= FEW_ROWS else 16
    return Block(rows, cols, min(16, max(1, rows * cols // (32 * per_thread))))


@triton.jit
def normed(x, weight, cols, eps):
    """Rows of float32 over their root mean square, in the dtype of `weight` before and after the product with it."""
    mean = tl.div_rn(tl.sum(x * x, 1), cols * 1.0)  # one column is a constant, which has no `.to`
    x = (x * tl.rsqrt(mean + eps)[:, None]).to(weight.dtype)
    return (x.to(tl.float32) * weight.to(tl.float32)[None, :]).to(weight.dtype)
