"""Arguments of paged_attention for rows of different lengths, in a pool of pages that lie in any order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwenopt.ops.kv_append import quantize_tokens


@dataclass(frozen=True)
class Ragged:
    """Rows of `lengths` keys each, of which the last `queries` ask.

    `packed`: the queries one after another, then `padding` tokens of no row. Otherwise all rows have the same number of
    queries, which stand at the end of the longest. What no query may see is NaN: pages that no row has, places behind
    the last key.
    """

    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    int8: bool = False
    window: int = 0
    padding: int = 0
    packed: bool = True
    spare_pages: int = 2

    def but(self, **changes: Any) -> Ragged:
        """The same with some fields changed."""
        return replace(self, **changes)

    def build(self, seed: int = 0) -> tuple[Any, ...]:
        """The arguments of `paged_attention`, floating point ones in `dtype`."""
        generator = torch.Generator().manual_seed(seed)
        num_pages = [-(-n // self.page_size) for n in self.lengths]
        pages = torch.randperm(sum(num_pages) + self.spare_pages, generator=generator)
        table = torch.full((len(self.lengths), max([1, *num_pages]) + 1), -1, dtype=torch.int32)
        pools = torch.full((2, len(pages), self.kv_heads, self.page_size, self.head_dim), torch.nan)
        taken = 0
        for row, (length, count) in enumerate(zip(self.lengths, num_pages, strict=True)):
            table[row, :count] = own = pages[taken : taken + count]
            taken += count
            for i, page in enumerate(own.tolist()):
                there = min(self.page_size, length - i * self.page_size)
                shape = (2, self.kv_heads, there, self.head_dim)
                pools[:, page, :, :there] = torch.randn(shape, generator=generator)
        k, v, k_scale, v_scale = self._stored(pools)
        starts, positions = self._queries()
        batch, seq = (1, len(positions)) if self.packed else (len(self.lengths), self.queries[0])
        q = torch.randn(batch, seq, self.heads, self.head_dim, generator=generator).to(self.dtype).transpose(1, 2)
        return q, k, v, k_scale, v_scale, table, starts, positions, None, self.window, self.head_dim**-0.5

    def _stored(self, pools: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if not self.int8:
            return pools[0].to(self.dtype), pools[1].to(self.dtype), None, None
        (k, k_scale), (v, v_scale) = (quantize_tokens(pool.nan_to_num(1e6)) for pool in pools)
        return k, v, k_scale, v_scale

    def _queries(self) -> tuple[Tensor | None, Tensor]:
        if not self.packed:
            longest = max(self.lengths)
            return None, torch.arange(longest - self.queries[0], longest)
        starts = torch.tensor([0, *self.queries]).cumsum(0).to(torch.int32)
        rows = [torch.arange(n - q, n) for n, q in zip(self.lengths, self.queries, strict=True)]
        return starts, torch.cat([*rows, torch.full((self.padding,), max(self.lengths) - 1)])
