"""linear_argmax on a GPU: up to 16 rows, one pass over the weight, no logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.cuda import linear
from qwenopt.ops.cuda.launch import Launch, Run, pack

# Enough for several on every multiprocessor; each takes its share of the vocabulary, so that few meet at the end.
MAX_BLOCKS = 1024


def accepts(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if x.dtype != torch.bfloat16:
        return f"{x.dtype} (the kernel has bfloat16)"
    return linear.accepts(x, weight, bias)


def linear_argmax(run: Run, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """On the kernel where rows lie in whole 16 bytes; else from logits in memory."""
    x, (n, k) = linear.rows_of(x), weight.shape
    rows = x.numel() // k if k else 0
    if not (0 < rows <= linear.MAX_ROWS and linear.in_tiles(x, weight)):
        return linear.linear(run, x, weight, bias).reshape(-1, n).argmax(-1, keepdim=True)
    bias = bias if bias is None else bias.contiguous()
    ids = torch.empty(rows, 1, dtype=torch.int64, device=x.device)
    # What blocks count in. A call's own, since another stream's may overlap.
    space = torch.zeros(linear.MAX_ROWS + 1, dtype=torch.int64, device=x.device)
    args = linear.args_of(x, weight, bias, None) + pack(space, space[linear.MAX_ROWS :], ids)
    blocks = min(-(-n // linear.TILE_ROWS), MAX_BLOCKS)
    run(Launch(f"linear_argmax_bfloat16_{8 if rows <= 8 else 16}", (blocks, 1, 1), linear.TILE_THREADS, args))
    return ids
