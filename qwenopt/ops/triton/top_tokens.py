"""top_tokens by the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.triton import DTYPES, dtypes, unit_strides

MAX_K = 64  # each of them is a reduction of its own
MAX_VOCAB = 1 << 19  # a row's parts then still fit one program


def accepts(logits: Tensor, k: int) -> str | None:
    if k > MAX_K:
        return f"k {k} (the kernel has up to {MAX_K})"
    if logits.shape[1] > MAX_VOCAB:
        return f"{logits.shape[1]} logits in a row (the kernel has up to {MAX_VOCAB})"
    return dtypes(DTYPES, logits=logits) or unit_strides(logits=logits)


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    from qwenopt.triton_kernels.top_tokens import launch, num_parts

    rows, vocab = logits.shape
    values = torch.empty(rows, k, dtype=logits.dtype, device=logits.device)
    ids = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
    keys = torch.empty(rows, num_parts(vocab), k, dtype=torch.int64, device=logits.device)
    if rows:
        with torch.cuda.device_of(logits):
            launch(logits, keys, values, ids)
    return values, ids
