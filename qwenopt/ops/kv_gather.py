"""kv_gather, paged_mask: keys and values copied out of their pages, for attention that knows no pages.

What a paged cache gives to a model that runs without this backend. Compiled, both go: attention over them becomes
`paged_attention`, which reads the pages where they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwenopt.ops.kv_append import check_pools
from qwenopt.ops.op import Op


def check_table(op: str, block_table: Tensor, q_starts: Tensor | None, num_rows: int | None) -> None:
    """Raise unless the table is int32 [rows, pages] and fits `q_starts` int32 [rows + 1], or the number of rows."""
    torch._check(
        block_table.dim() == 2 and block_table.dtype == torch.int32,
        lambda: f"{op}: block_table {tuple(block_table.shape)} {block_table.dtype}; need (rows, pages) torch.int32",
    )
    if q_starts is not None:
        torch._check(
            q_starts.dim() == 1 and q_starts.shape[0] == block_table.shape[0] + 1 and q_starts.dtype == torch.int32,
            lambda: (
                f"{op}: q_starts {tuple(q_starts.shape)} {q_starts.dtype}; need torch.int32 "
                f"({block_table.shape[0] + 1},) for {block_table.shape[0]} rows of the block table"
            ),
        )
    elif num_rows is not None:
        torch._check(
            num_rows == block_table.shape[0],
            lambda: f"{op}: {num_rows} rows, but {block_table.shape[0]} in the block table",
        )


def _check(
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    packed: bool,
    dtype: torch.dtype,
) -> None:
    check_pools("kv_gather", k_pool, v_pool, k_scale, v_scale)
    check_table("kv_gather", block_table, None, None)


def kv_gather(
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    packed: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Keys and values of each row, page after page as its line of the block table says.

    Pools [pages, G, page_size, D] with scales where they are int8; block_table int32 [rows, M], a negative entry for no
    page (what is returned in its place means nothing). Returns keys and values [rows, G, M * page_size, D] in `dtype`;
    `packed`: the rows one after another, [1, G, rows * M * page_size, D].
    """
    _check(k_pool, v_pool, k_scale, v_scale, block_table, packed, dtype)
    table = block_table.clamp(min=0).long()
    out = []
    for pool, scale in ((k_pool, k_scale), (v_pool, v_scale)):
        x = pool[table]  # [rows, M, G, page_size, D]
        x = x.to(dtype) if scale is None else (x.float() * scale[table][..., None]).to(dtype)
        x = x.permute(2, 0, 1, 3, 4).flatten(1, 3)[None] if packed else x.transpose(1, 2).flatten(2, 3)
        out.append(x.contiguous())
    return out[0], out[1]


def _fake(k_pool: Tensor, v_pool: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Shapes alone: the reference is a dozen ops, which would be traced for each layer."""
    _check(k_pool, v_pool, *rest)
    _, _, block_table, packed, dtype = rest
    (_, groups, page_size, dim), (rows, width) = k_pool.shape, block_table.shape
    lines, keys = (1, rows * width * page_size) if packed else (rows, width * page_size)
    shape = (lines, groups, keys, dim)
    return k_pool.new_empty(shape, dtype=dtype), v_pool.new_empty(shape, dtype=dtype)


def _check_mask(q_starts: Tensor, q_positions: Tensor, num_keys: int, window: int) -> None:
    ok = q_starts.dim() == 1 and q_starts.dtype == torch.int32
    torch._check(
        ok and q_positions.dim() == 1 and q_positions.dtype == torch.int64,
        lambda: (
            f"paged_mask: q_starts {tuple(q_starts.shape)} {q_starts.dtype}, q_positions {tuple(q_positions.shape)} "
            f"{q_positions.dtype}; need torch.int32 (rows + 1,) and torch.int64 (tokens,)"
        ),
    )


def rows_of_tokens(q_starts: Tensor, num_tokens: int) -> Tensor:
    """The row of each of the first `num_tokens` tokens, int64; the number of rows for a token behind the last row."""
    return torch.searchsorted(q_starts[1:], torch.arange(num_tokens, device=q_starts.device), right=True)


def paged_mask(q_starts: Tensor, q_positions: Tensor, num_keys: int, window: int) -> Tensor:
    """What tokens packed row after row see of keys gathered row after row: bool [1, 1, T, rows * num_keys].

    Tokens q_starts[r] to q_starts[r + 1] (int32 [rows + 1]) are those of row r, at q_positions (int64 [T]) of it. Each
    sees the keys of its row up to its own position, of which the last `window`, if that is not 0.
    """
    _check_mask(q_starts, q_positions, num_keys, window)
    rows = rows_of_tokens(q_starts, q_positions.shape[0])
    keys = torch.arange(num_keys, device=q_starts.device)
    seen = keys <= q_positions[:, None]
    if window:
        seen = seen & (keys > q_positions[:, None] - window)
    own = torch.arange(q_starts.shape[0] - 1, device=q_starts.device) == rows[:, None]
    return (own[:, :, None] & seen[:, None, :]).flatten(1)[None, None]


KV_GATHER = Op(kv_gather, check=_check, fake=_fake)
PAGED_MASK = Op(paged_mask, check=_check_mask)
