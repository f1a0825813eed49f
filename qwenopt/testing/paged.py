"""Batches of rows in pages for the tests: pages in random order, everything that no row wrote poisoned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What a table may hold where no key is: none of it may be followed.
UNUSED = (-1, -(2**31), 2**31 - 1, 10_000)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of `x` [..., D] as the contract has them."""
    largest = x.float().abs().amax(-1)
    inverse = torch.where(largest > 0, 127 / largest, 0.0)
    return (x.float() * inverse[..., None]).round().to(torch.int8), largest / 127


@dataclass
class Rows:
    """Keys and values of rows, [G, length, D] each, and the pools and the table that hold them.

    Where the pools hold codes these are codes times scales, in float32: kernels may round that to a dtype or not.
    """

    pools: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    table: Tensor
    keys: list[Tensor]
    values: list[Tensor]


def empty_pools(pages: int, groups: int, page_size: int, dim: int, dtype: torch.dtype, coded: bool) -> Any:
    """Pools and scales that show when something is read that was not written."""
    shape = (pages, groups, page_size, dim)
    if not coded:
        return *(torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)), None, None
    codes = (torch.full(shape, 127, dtype=torch.int8) for _ in range(2))
    return *codes, *(torch.full(shape[:3], torch.nan) for _ in range(2))


def in_pages(
    keys: Sequence[Tensor], values: Sequence[Tensor], page_size: int, coded: bool = False, hidden: Sequence[int] = ()
) -> Rows:
    """Put rows into pages; of row r the first hidden[r] keys are not written, nor are pages for them given."""
    groups, _, dim = keys[0].shape
    needed = [-(-k.shape[1] // page_size) for k in keys]
    pages = sum(needed) + 3
    pools = empty_pools(pages, groups, page_size, dim, keys[0].dtype, coded)
    table = torch.tensor(UNUSED, dtype=torch.int64).repeat(len(keys), max(needed) + 2)[:, : max(needed) + 2]
    table = table.to(torch.int32).contiguous()
    free = torch.randperm(pages).tolist()
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for r, length in enumerate(k.shape[1] for k in keys):
        first = hidden[r] if hidden else 0
        for n in range(first // page_size, needed[r]):
            table[r, n] = free.pop()
        at = torch.arange(first, length)
        page, place = table[r].long()[at // page_size], at % page_size
        for x, pool, scale, to in zip((keys[r], values[r]), pools[:2], pools[2:], found, strict=True):
            tokens = x[:, first:].transpose(0, 1)
            read = x.float() if coded else x.clone()
            if coded:
                codes, scales = quantized(tokens)
                pool[page, :, place], scale[page, :, place] = codes, scales
                read[:, first:] = (codes.float() * scales[..., None]).transpose(0, 1)
            else:
                pool[page, :, place] = tokens
            to.append(read)
    return Rows(pools, table, *found)


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: the output of queries [H, n, D] over keys [G, L, D], the same of |v|, the largest score."""
    group = q.shape[0] // k.shape[0]
    k, v = (t.double().repeat_interleave(group, 0) for t in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    size = (q.double().abs() @ k.abs().transpose(-1, -2)).max() * scale if k.numel() else torch.zeros(())
    probs = (scores + bias).softmax(-1).nan_to_num()
    return probs @ v, probs @ v.abs(), size


def order_bias(positions: Tensor, length: int, window: int) -> Tensor:
    """What queries at `positions` see of `length` keys, as an additive [n, length] in float64."""
    keys = torch.arange(length)
    seen = keys <= positions[:, None]
    if window:
        seen &= keys > positions[:, None] - window
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
