"""kv_reserve: make room in a paged cache for the tokens of one call, from inside a graph.

A graph holds tensors, not a cache's bookkeeping. So the cache goes by a handle, a number in a tensor: a compiled graph
serves every cache. The op runs on the host: it moves no data, takes pages, and writes where the tokens go.
"""

from __future__ import annotations

import itertools
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from qwenopt.ops.op import Op


class Reserves(Protocol):
    """A paged cache, as far as this op knows it."""

    def reserve_batch(self, batch: int, seq: int, block_table: Tensor, length: Tensor, slots: Tensor) -> None:
        """Take pages for `seq` more tokens of each of `batch` rows and write table, length and slots; or raise.

        The tensors may be copies of the cache's own: a compiler that makes graphs functional copies back.
        """


class Handles:
    """Numbers by which graphs know caches; a cache's number ends with it."""

    def __init__(self) -> None:
        self._count = itertools.count(1)
        self._caches: WeakValueDictionary[int, Reserves] = WeakValueDictionary()

    def new(self, cache: Reserves) -> int:
        """A number for `cache`."""
        handle = next(self._count)
        self._caches[handle] = cache
        return handle

    def cache(self, handle: int) -> Reserves:
        """The cache of that number, which must live."""
        if handle not in self._caches:
            raise RuntimeError(f"kv_reserve: no cache has the handle {handle}; it was freed, or comes from elsewhere")
        return self._caches[handle]


HANDLES = Handles()


def _check(handle: Tensor, block_table: Tensor, length: Tensor, slots: Tensor, batch: int, seq: int) -> None:
    # How many rows and tokens there may be is the cache's to say.
    torch._check(
        block_table.dim() == 2 and block_table.dtype == torch.int32 and slots.dim() == 1 and slots.dtype == torch.int64,
        lambda: (
            f"kv_reserve: block_table {tuple(block_table.shape)} {block_table.dtype}, slots {tuple(slots.shape)} "
            f"{slots.dtype}; need torch.int32 (rows, pages) and torch.int64 (places,)"
        ),
    )


def kv_reserve(handle: Tensor, block_table: Tensor, length: Tensor, slots: Tensor, batch: int, seq: int) -> None:
    """Take pages for `seq` more tokens of rows 0 to `batch` of the cache that `handle` (int64, on the host) names.

    Writes the rows' lines of block_table (int32 [rows, pages]), adds `seq` to `length` (int64, of one element), and
    writes into slots (int64) where token `b * seq + s` goes. Raises, before anything is written, where there are not
    enough pages or a row would be too long.
    """
    _check(handle, block_table, length, slots, batch, seq)
    HANDLES.cache(int(handle)).reserve_batch(batch, seq, block_table, length, slots)


KV_RESERVE = Op(kv_reserve, check=_check, fake=_check, opaque=True, mutates=("block_table", "length", "slots"))
