"""silu_mul in Triton: a program takes a stretch of one row; gate and up may lie in one matrix."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024


@triton.jit(do_not_specialize=["per_row"])
def silu_mul_kernel(
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, num_cols, per_row, BLOCK: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) // per_row).to(tl.int64)
    col = (tl.program_id(0) % per_row) * BLOCK + tl.arange(0, BLOCK)
    keep = col < num_cols
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=keep, other=0)
    up = tl.load(up_ptr + row * up_stride + col, mask=keep, other=0).to(tl.float32)
    x = gate.to(tl.float32)
    silu = tl.div_rn(x, 1.0 + tl.exp(-x)).to(gate.dtype)
    tl.store(out_ptr + row * num_cols + col, (silu.to(tl.float32) * up).to(gate.dtype), mask=keep)


def launch(gate: Tensor, up: Tensor, out: Tensor, gate_stride: int, up_stride: int) -> None:
    """`silu(gate) * up` of the evenly spaced rows of two [..., I] into the contiguous `out`."""
    num_cols = gate.shape[-1]
    block = min(MAX_BLOCK, triton.next_power_of_2(num_cols))
    per_row = triton.cdiv(num_cols, block)
    silu_mul_kernel[(gate.numel() // num_cols * per_row,)](
        gate, up, out, gate_stride, up_stride, num_cols, per_row, BLOCK=block, num_warps=max(1, block // 256)
    )
