"""Arguments for the ops of a paged cache; see cases.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scales:
    """A float32 tensor that stays one whatever a case is built in."""

    tensor: Tensor


def _pools(pages: int, groups: int, page_size: int, dim: int, coded: bool) -> tuple[Any, ...]:
    """Pools of keys and values, with scales where they are `coded` in int8."""
    shape = (pages, groups, page_size, dim)
    if not coded:
        return torch.randn(shape), torch.randn(shape), None, None
    codes = (torch.randint(-127, 128, shape, dtype=torch.int8) for _ in range(2))
    return *codes, *(Scales((1 + torch.rand(shape[:3])) / 100) for _ in range(2))


def _append(
    sizes: tuple[int, int, int, int], page_size: int = 16, coded: bool = False, skipped: int = 0
) -> tuple[Any, ...]:
    batch, groups, seq, dim = sizes
    tokens = batch * seq
    pages = tokens // page_size + 2
    slots = torch.randperm(pages * page_size)[:tokens]
    slots[:skipped] = -1
    k, v = (torch.randn(batch, seq, groups, dim).transpose(1, 2) for _ in range(2))
    return *_pools(pages, groups, page_size, dim, coded), k, v, slots


def _table(rows: int, width: int, pages: int) -> Tensor:
    return torch.randperm(pages)[: rows * width].view(rows, width).to(torch.int32)


def _gather(rows: int, width: int, page_size: int, packed: bool, coded: bool = False) -> tuple[Any, ...]:
    table = _table(rows, width, rows * width + 2)
    table[-1, -1:] = -1
    return *_pools(rows * width + 2, 2, page_size, 16, coded), table, packed, torch.float32


def _paged(
    queries: tuple[int, ...],
    lengths: tuple[int, ...],
    heads: tuple[int, int] = (8, 2),
    dim: int = 32,
    page_size: int = 16,
    window: int = 0,
    coded: bool = False,
    padding: int = 0,
) -> tuple[Any, ...]:
    """Rows of those lengths whose last queries are packed, and tokens of no row behind them."""
    width = -(-max(lengths) // page_size)
    pages = len(lengths) * width + 2
    positions = [torch.arange(n - s, n) for s, n in zip(queries, lengths, strict=True)]
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    q = torch.randn(1, sum(queries) + padding, heads[0], dim).transpose(1, 2)
    return (
        q,
        *_pools(pages, heads[1], page_size, dim, coded),
        _table(len(lengths), width, pages),
        starts,
        torch.cat([*positions, torch.zeros(padding, dtype=torch.int64)]),
        None,
        window,
        dim**-0.5,
    )


def _paged_batch(
    rows: int,
    queries: int,
    width: int,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    window: int = 0,
    coded: bool = False,
) -> tuple[Any, ...]:
    q = torch.randn(rows, queries, 8, 32).transpose(1, 2)
    pools, table = _pools(rows * width + 2, 2, 16, 32, coded), _table(rows, width, rows * width + 2)
    return q, *pools, table, None, positions, mask, window, 32**-0.5


# Row b does not see its first b keys.
PADDED = torch.arange(48) >= torch.arange(3)[:, None, None, None]

PAGED: dict[str, dict[str, Callable[[], tuple[Any, ...]]]] = {
    "kv_append": {
        "decode": lambda: _append((3, 2, 1, 64)),
        "prefill": lambda: _append((1, 2, 21, 36)),
        "batch": lambda: _append((2, 4, 9, 128), page_size=64, skipped=3),
        "pages of 5": lambda: _append((2, 3, 4, 7), page_size=5),
        "int8": lambda: _append((2, 3, 5, 32), coded=True, skipped=1),
        "int8 odd": lambda: _append((1, 1, 6, 19), coded=True),
        "no tokens": lambda: _append((1, 2, 0, 32)),
        "nothing to keep": lambda: _append((2, 2, 3, 32), skipped=6),
    },
    "kv_gather": {
        "batch": lambda: _gather(3, 2, 16, packed=False),
        "packed": lambda: _gather(3, 2, 16, packed=True),
        "int8": lambda: _gather(2, 3, 5, packed=False, coded=True),
        "one page": lambda: (*_pools(1, 2, 4, 6, False), torch.zeros(1, 1, dtype=torch.int32), True, torch.float32),
    },
    "paged_mask": {
        "decode": lambda: (torch.arange(4, dtype=torch.int32), torch.tensor([3, 0, 15]), 16, 0),
        "ragged": lambda: (torch.tensor([0, 2, 2, 5]).int(), torch.tensor([3, 4, 9, 10, 11, 7, 7]), 16, 0),
        "window": lambda: (torch.tensor([0, 2, 3]).int(), torch.tensor([3, 4, 9]), 16, 3),
    },
    "paged_attention": {
        "decode": lambda: _paged((1, 1, 1), (20, 40, 33)),
        "prefill": lambda: _paged((40,), (40,)),
        "ragged": lambda: _paged((1, 0, 17, 3), (200, 5, 60, 3), padding=2),
        **{f"pages of {n}": partial(_paged, (2, 1), (70, 13), page_size=n) for n in (5, 32, 48, 64, 256)},
        **{f"group of {n}": partial(_paged, (2, 1), (40, 13), heads=(2 * n, 2)) for n in (1, 3, 7, 16)},
        **{f"head_dim {d}": partial(_paged, (2, 1), (40, 13), dim=d) for d in (2, 64, 72, 128, 256)},
        "window": lambda: _paged((1, 20), (90, 64), window=19),
        "int8": lambda: _paged((1, 20), (90, 64), coded=True),
        "int8 window": lambda: _paged((1, 20), (90, 64), coded=True, window=30),
        "long": lambda: _paged((1, 2), (1500, 30), dim=64),
        "tokens of no row": lambda: _paged((0, 0), (20, 20), padding=3),
        "batch": lambda: _paged_batch(3, 1, 3, torch.tensor([40])),
        "batch of many": lambda: _paged_batch(2, 9, 3, torch.arange(30, 39)),
        "batch window": lambda: _paged_batch(2, 3, 3, torch.arange(30, 33), window=20),
        "batch int8": lambda: _paged_batch(2, 3, 3, torch.arange(30, 33), coded=True),
        "batch without positions": lambda: _paged_batch(2, 2, 2),
        "left padding": lambda: _paged_batch(3, 1, 3, torch.tensor([45]), PADDED),
        "mask": lambda: _paged_batch(2, 3, 2, None, torch.rand(2, 8, 3, 32) > 0.4),
        "all hidden": lambda: _paged_batch(2, 3, 2, None, torch.zeros(1, 1, 3, 32, dtype=torch.bool)),
        "additive": lambda: _paged_batch(2, 3, 2, torch.tensor([20, 21, 22]), torch.randn(2, 1, 3, 32)),
    },
}
