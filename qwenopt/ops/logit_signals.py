"""logit_signals: what the exit rules of thinking control read from the logits of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwenopt.ops import cpu, triton
from qwenopt.ops.op import Op
from qwenopt.ops.steps import Array, NotPlanned, Steps, need_contiguous
from qwenopt.ops.triton import logit_signals as by_triton


def _check(logits: Tensor, end: int, entropy: bool) -> None:
    torch._check(
        logits.dim() == 2 and 0 <= end < logits.shape[1],
        lambda: f"logit_signals: logits {tuple(logits.shape)}, end {end}; logits must be (R, V) with 0 <= end < V",
    )
    torch._check(
        logits.is_floating_point(), lambda: f"logit_signals: {logits.dtype} where a floating point dtype is needed"
    )


def logit_signals(logits: Tensor, end: int, entropy: bool) -> Tensor:
    """Compute the margin and, if asked for, the entropy of each row of `logits` [R, V], of any floating dtype.

    Returns float32 [R, 2]: how far the logit of token `end` lies below the largest, and the entropy of the softmax in
    nats (0 without `entropy`). A logit of -inf has no share in it; a row with NaN, with +inf or of -inf alone has NaN.
    """
    _check(logits, end, entropy)
    margin = logits.amax(-1).float() - logits[:, end].float()
    if not entropy:
        return torch.stack((margin, torch.zeros_like(margin)), 1)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.stack((margin, torch.special.entr(wide.softmax(-1)).sum(-1).float()), 1)


LOGIT_SIGNALS = Op(logit_signals, check=_check)


def _accepts(logits: Tensor, end: int, entropy: bool) -> str | None:
    return cpu.one_dtype(logits) or cpu.last_dim_contiguous(logits=logits)


def _operands(logits: Any, out: Any, scratch: Any, end: int, stride: int, entropy: bool) -> tuple[Any, ...]:
    addresses = (logits.data_ptr(), out.data_ptr(), scratch.data_ptr())
    return (*addresses, *logits.shape, end, stride, entropy, cpu.code(logits))


def _record(steps: Steps, logits: Array, end: int, entropy: bool) -> Array:
    need_contiguous(logits=logits)
    if logits.dtype not in cpu.DTYPE_CODES:
        raise NotPlanned(f"logits are {logits.dtype}")
    rows, size = logits.static_shape()
    out = steps.empty((rows, 2), torch.float32)
    scratch = steps.scratch(cpu.lib().logit_signals_scratch_bytes(rows, size))
    steps.add("logit_signals", _operands(logits, out, scratch, end, size, entropy), (logits,), (out, scratch))
    return out


@LOGIT_SIGNALS.provider("cpu", "cpu", available=cpu.available, accepts=_accepts, record=_record)
def logit_signals_cpu(logits: Tensor, end: int, entropy: bool) -> Tensor:
    out = torch.empty((logits.shape[0], 2), dtype=torch.float32)
    scratch = torch.empty(cpu.lib().logit_signals_scratch_bytes(*logits.shape), dtype=torch.uint8)
    cpu.lib().logit_signals(*_operands(logits, out, scratch, end, logits.stride(0), entropy), cpu.threads())
    return out


LOGIT_SIGNALS.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(by_triton.logit_signals)
