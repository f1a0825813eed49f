"""The last linear and its argmax on a GPU: up to 16 rows, one pass over the weight, no logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops import cpu
from qwenopt.ops.cuda import linear
from qwenopt.ops.cuda.launch import Launch, Run, pack

# Enough for several on every multiprocessor; each takes its share of the vocabulary, so that few meet at the end.
MAX_BLOCKS = 1024


def accepts(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    k = weight.shape[1]
    rows = x.numel() // k if k else 0
    if not 0 < rows <= linear.MAX_ROWS:
        return f"{rows} rows (the kernel has 1 to {linear.MAX_ROWS})"
    if x.dtype != torch.bfloat16 or not linear.in_tiles(linear.rows_of(x), weight):
        return f"{x.dtype} rows of {k}; the kernel has bfloat16 in rows of whole, aligned {linear.ALIGNMENT} bytes"
    return linear.accepts(x, weight, bias) or (cpu.contiguous(bias=bias) if bias is not None else None)


def workspace(device: torch.device) -> Tensor:
    """What `lm_head` counts in: zeros, which every call leaves as zeros. Calls that may overlap need one each."""
    return torch.zeros(linear.MAX_ROWS + 1, dtype=torch.int64, device=device)


def lm_head(run: Run, x: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor | None, space: Tensor) -> Tensor:
    """`linear(x, weight, bias).argmax(-1)` of x [M, K], M at most 16, int64 [M]: the first of equal logits.

    `logits` [M, N], contiguous, is written to where it is given. `space` is a `workspace`.
    """
    x = linear.rows_of(x)
    rows, n = x.numel() // weight.shape[1], weight.shape[0]
    ids = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    args = linear.args_of(x, weight, bias, logits) + pack(space, space[linear.MAX_ROWS :], ids)
    blocks = min(-(-n // linear.TILE_ROWS), MAX_BLOCKS)
    run(Launch(f"lm_head_bfloat16_{8 if rows <= 8 else 16}", (blocks, 1, 1), linear.TILE_THREADS, args))
    return ids
