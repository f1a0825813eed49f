"""logit_signals by the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.triton import DTYPES, dtypes, unit_strides


def accepts(logits: Tensor, end: int, entropy: bool) -> str | None:
    return dtypes(DTYPES, logits=logits) or unit_strides(logits=logits)


def logit_signals(logits: Tensor, end: int, entropy: bool) -> Tensor:
    from qwenopt.triton_kernels.logit_signals import launch, num_parts

    rows, vocab = logits.shape
    out = torch.empty(rows, 2, dtype=torch.float32, device=logits.device)
    parts = torch.empty(rows, num_parts(vocab), 3, dtype=torch.float32, device=logits.device)
    if rows:
        with torch.cuda.device_of(logits):
            launch(logits, parts, out, end, entropy)
    return out
