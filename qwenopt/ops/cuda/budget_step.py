"""budget_step and budget_guard on a GPU: a warp, and a thread, for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwenopt.ops import cpu
from qwenopt.ops.cuda import DTYPES
from qwenopt.ops.cuda.launch import WARP, Launch, Run, dtype_name, pack


def accepts_step(
    sampled: Tensor, signals: Tensor, state: Tensor, forced: Tensor, lut: Tensor, ids: Tensor
) -> str | None:
    return cpu.contiguous(sampled=sampled, signals=signals, state=state, forced=forced, lut=lut, ids=ids)


def step(run: Run, sampled: Tensor, signals: Tensor, state: Tensor, forced: Tensor, lut: Tensor, ids: Tensor) -> Tensor:
    out = torch.empty_like(sampled)
    rows, length = forced.shape
    if rows:
        args = pack(sampled, signals, state, forced, lut, ids, out, rows, length, lut.shape[0])
        run(Launch("budget_step", (rows, 1, 1), WARP, args))
    return out


def accepts_guard(logits: Tensor, state: Tensor, ids: Tensor) -> str | None:
    return (
        cpu.one_dtype(logits, among=DTYPES)
        or cpu.last_dim_contiguous(logits=logits)
        or cpu.contiguous(state=state, ids=ids)
    )


def guard(run: Run, logits: Tensor, state: Tensor, ids: Tensor) -> Any:
    rows, vocab = logits.shape
    if rows:
        args = pack(logits, state, ids, rows, vocab, logits.stride(0), cpu.code(logits))
        run(Launch(f"budget_guard_{dtype_name(logits)}", (-(-rows // WARP), 1, 1), WARP, args))
