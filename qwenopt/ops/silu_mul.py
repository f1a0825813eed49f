"""silu_mul: the gate of a SwiGLU MLP, `silu(gate) * up` (Shazeer, 2020, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops import cpu, triton
from qwenopt.ops.op import Op
from qwenopt.ops.steps import Array, Steps, need_contiguous
from qwenopt.ops.triton import silu_mul as by_triton


def _check(gate: Tensor, up: Tensor) -> None:
    torch._check(
        gate.shape == up.shape,
        lambda: f"silu_mul: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape",
    )


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise; gate and up [..., I] of one shape and dtype."""
    _check(gate, up)
    return F.silu(gate) * up


SILU_MUL = Op(silu_mul, check=_check)


def _accepts(gate: Tensor, up: Tensor) -> str | None:
    return cpu.one_dtype(gate, up) or cpu.contiguous(gate=gate, up=up)


def _operands(gate: Any, up: Any, out: Any) -> tuple[Any, ...]:
    cols = gate.shape[-1] if gate.numel() and gate.dim() else 1
    addresses = (gate.data_ptr(), up.data_ptr(), out.data_ptr())
    return (*addresses, gate.numel() // cols, cols, cols, cols, cpu.code(gate))


def _record(steps: Steps, gate: Array, up: Array) -> Array:
    need_contiguous(gate=gate, up=up)
    out = steps.empty(gate.shape, gate.dtype)
    steps.add("silu_mul", _operands(gate, up, out), (gate, up), (out,))
    return out


@SILU_MUL.provider("cpu", "cpu", available=cpu.available, accepts=_accepts, record=_record)
def silu_mul_cpu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = cpu.as_rows(gate), cpu.as_rows(up)
    out = torch.empty_like(gate)
    cpu.lib().silu_mul(*_operands(gate, up, out), cpu.threads())
    return out


SILU_MUL.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(by_triton.silu_mul)
