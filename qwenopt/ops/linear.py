"""linear: `x @ weight.T + bias` straight from the row-major weight."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt import native
from qwenopt.ops import cpu, library, triton
from qwenopt.ops.cuda import linear as cuda_kernels
from qwenopt.ops.cuda.providers import register
from qwenopt.ops.op import Op
from qwenopt.ops.steps import Array, NotPlanned, Steps
from qwenopt.ops.triton import linear as by_triton

# Up to this many rows the native kernel is faster than oneDNN and MKL, or as fast: while it streams the weight once,
# and longer with AMX, or where the processor has no products of the type: oneDNN then widens both operands, at a fifth
# of what floats reach (bench_linear.py). Decided inside the provider, not at compile time, so that one graph serves
# every batch.
MAX_ROWS = 16
MAX_BF16_ROWS = {"avx2": math.inf, "avx512": math.inf, "amx": 1024}


@functools.cache
def _most_rows(dtype: torch.dtype) -> float:
    """Up to how many rows a product goes to the native kernel."""
    isa = native.cpu_isa()
    if dtype == torch.bfloat16:
        return MAX_BF16_ROWS.get(isa, MAX_ROWS)
    if dtype == torch.float16 and isa != "generic" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return math.inf
    return MAX_ROWS


def check_weight(op: str, x: Tensor, weight: Tensor) -> None:
    """Raise unless `weight` is a matrix whose rows are as long as those of `x`."""
    torch._check(
        weight.dim() == 2 and x.dim() >= 1 and x.shape[-1] == weight.shape[1],
        lambda: f"{op}: x {tuple(x.shape)} and weight {tuple(weight.shape)}; need (..., K) and (N, K)",
    )


def check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless the rows of `x` and `weight` are as long, and `bias` as the weight has rows."""
    check_weight(op, x, weight)
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.shape[0] == weight.shape[0],
            lambda: f"{op}: bias {tuple(bias.shape)} for weight {tuple(weight.shape)}; it must be ({weight.shape[0]},)",
        )


_check = functools.partial(check_linear, "linear")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x` [..., K] times `weight` [N, K] transposed, plus `bias` [N] if given; returns [..., N] in one dtype."""
    _check(x, weight, bias)
    return F.linear(x, weight, bias)


LINEAR = Op(linear, check=_check)


def _accepts(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if weight.dim() != 2:
        return f"weight has {weight.dim()} dimensions"
    if weight.stride(0) < weight.shape[1] and weight.shape[0] > 1:
        return f"weight has stride {weight.stride(0)} between rows of {weight.shape[1]}"
    return cpu.one_dtype(x, weight, bias) or cpu.last_dim_contiguous(weight=weight)


def _on_kernel(rows: int, dtype: torch.dtype) -> bool:
    """Whether a product of that many rows goes to the native kernel."""
    return 0 < rows <= _most_rows(dtype)


def _operands(x: Any, weight: Any, bias: Any, out: Any, scratch: Any) -> tuple[Any, ...]:
    n, k = weight.shape
    addresses = (0 if t is None else t.data_ptr() for t in (x, weight, bias, out, scratch))
    return (*addresses, x.numel() // k, n, k, cpu.row_stride(x), weight.stride(0), n, cpu.code(x))


def _record(steps: Steps, x: Array, weight: Array, bias: Array | None) -> Array:
    n, k = weight.static_shape()
    rows = x.numel() // k if k else 0
    if not _on_kernel(rows, x.dtype):
        raise NotPlanned(f"linear of {rows} rows (kernel: 1..{_most_rows(x.dtype)})")
    if cpu.row_stride(x) is None:
        raise NotPlanned("x has rows of no one stride")
    scratch = steps.scratch(cpu.lib().linear_scratch_bytes(rows, n, k, cpu.code(x), steps.threads))
    out = steps.empty((*x.shape[:-1], n), x.dtype)
    steps.add("linear", _operands(x, weight, bias, out, scratch), (x, weight, bias), (out, scratch))
    return out


@LINEAR.provider("cpu", "cpu", available=cpu.available, accepts=_accepts, record=_record)
def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, k = weight.shape
    rows = x.numel() // k if k else 0
    if not _on_kernel(rows, x.dtype):
        return F.linear(x, weight, bias)
    lib, threads = cpu.lib(), cpu.threads()
    x = x if cpu.row_stride(x) is not None else x.contiguous()
    scratch = torch.empty(lib.linear_scratch_bytes(rows, n, k, cpu.code(x), threads), dtype=torch.uint8)
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
    lib.linear(*_operands(x, weight, bias, out, scratch), threads)
    return out


LINEAR.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(by_triton.linear)


# Behind Triton, which is ahead or not by a measurement on a GPU; none was made yet.
register(LINEAR, cuda_kernels.accepts, cuda_kernels.linear)


LINEAR.provider("torch", "cuda", available=library.available, accepts=library.accepts_linear)(library.linear)
