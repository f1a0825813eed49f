"""PagedKVCache: many sequences of different lengths over one pool of pages (Kwon et al., arXiv 2309.06180).

Memory is held by page, not by the longest sequence; equal beginnings and forks share pages; nothing is copied or
allocated as sequences grow. The cache can be used in two ways, one at a time:

* as any transformers cache, `model(ids, past_key_values=cache)` or `model.generate(..., past_key_values=cache)`: the
  rows of the batch are the cache's rows, and all have one length;
* by rows that come and go, of any lengths: `open`, `fork`, `crop_row`, `free`, and a `PackedBatch` for each call.
  `qwenopt.generate` does this.

Keys and values are written by `qwenopt::kv_append` and read, in eager mode, through `qwenopt::kv_gather`, a copy.
Compiled by this backend, the copy goes: attention reads the pages where they lie (`qwenopt::paged_attention`).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from qwenopt.errors import QwenoptError
from qwenopt.ops.kv_reserve import HANDLES
from qwenopt.runtime.cache_stats import CacheStats, stats_of
from qwenopt.runtime.checks import check_whole, model_dtype, pool_dtype, text_config
from qwenopt.runtime.paged_layer import LayeredCache, PagedLayer, Places
from qwenopt.runtime.pool_memory import zeros
from qwenopt.runtime.rows import Rows


class PagedKVCache(LayeredCache):
    """A transformers cache over a pool of `num_pages` pages of `page_size` tokens for `max_batch_size` rows.

    `dtype` is the model's (default: the config's), `kv_dtype` torch.int8 for codes with a float32 scale for each token
    and head, `max_length` the most tokens of one row (default: what the pages and the model's positions allow).
    `salt` sets the contents of this cache apart from others', as for an adapter. Raises QwenoptError for sizes that do
    not fit, and OutOfPages, with nothing changed, when a call needs more pages than are free.
    """

    def __init__(
        self,
        config: Any,
        *,
        max_batch_size: int,
        num_pages: int,
        page_size: int = 16,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        max_length: int | None = None,
        salt: bytes = b"",
    ) -> None:
        config = text_config(config)
        sizes = {} if max_length is None else {"max_length": max_length}
        check_whole("PagedKVCache", max_batch_size=max_batch_size, num_pages=num_pages, page_size=page_size, **sizes)
        if not isinstance(salt, bytes):
            raise QwenoptError(f"PagedKVCache: salt {salt!r}; need bytes")
        self.config, self.page_size, self.num_pages = config, page_size, num_pages
        self.dtype = model_dtype(config, dtype)
        self.kv_dtype = pool_dtype(self.dtype, kv_dtype)
        self.device = torch.device(device or "cpu")
        max_pages = -(-(max_length or config.max_position_embeddings) // page_size)
        self.rows = Rows(num_pages, page_size, max_pages, self._copy_page, salt)
        max_pages = min(max_pages, num_pages)  # a batch's row has pages of its own, a packed row's may be anybody's
        self._batch: list[int] = []  # the rows of the batch, in order; empty: rows come and go
        self.places = Places(
            torch.full((max_batch_size, max_pages), -1, dtype=torch.int32, device=self.device),
            torch.zeros(num_pages * page_size, dtype=torch.int64, device=self.device),
            torch.tensor(HANDLES.new(self)),
            torch.zeros((), dtype=torch.int64, device=self.device),
        )
        self._page_counts = [0] * max_batch_size  # pages of each line that the table already holds
        types = layer_types(config)
        self.pools = [self._make_pools() for _ in types]
        layers = [
            PagedLayer(pools, self.places, is_first=i == 0, is_sliding=kind == "sliding_attention")
            for i, (pools, kind) in enumerate(zip(self.pools, types, strict=True))
        ]
        self._mark_static()
        super().__init__(layers=layers)

    def _make_pools(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        config = self.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (self.num_pages, config.num_key_value_heads, self.page_size, dim)
        try:
            keys, values = (zeros(shape, self.kv_dtype, self.device) for _ in range(2))
        except torch.OutOfMemoryError as error:
            error.add_note(f"PagedKVCache: a layer's keys of {self.num_pages} pages are {shape}; make fewer pages")
            raise
        if self.kv_dtype != torch.int8:
            return keys, values, None, None
        scales = (torch.zeros(shape[:3], dtype=torch.float32, device=self.device) for _ in range(2))
        return keys, values, *scales  # type: ignore[return-value]

    def _tensors(self) -> list[Tensor]:
        return [t for pools in self.pools for t in pools if t is not None]

    def _mark_static(self) -> None:
        for t in (*self._tensors(), self.places.block_table, self.places.slots, self.places.length):
            torch._dynamo.mark_static_address(t, guard=False)
        for t in (self.places.block_table, self.places.slots):
            torch._dynamo.mark_static(t)
        for t in self._tensors():  # one graph for any number of pages, but one for each size of a page
            torch._dynamo.maybe_mark_dynamic(t, 0)
            torch._dynamo.mark_static(t, list(range(1, t.dim())))

    def _copy_page(self, source: int, target: int) -> None:
        for t in self._tensors():
            t[target].copy_(t[source])

    # Rows that come and go.

    def open(self, tokens: Sequence[int] = ()) -> int:
        """A new row for a prompt; `length_of` it says how many of the prompt's tokens other rows' pages already hold.

        Whole pages only, and never the last token. The room for the rest is taken by the calls that write it.
        """
        self._not_in_batch("open")
        try:
            return self.rows.open([operator.index(token) for token in tokens])
        except TypeError as error:
            raise QwenoptError(f"paged cache: open(tokens): {error}; need token ids") from error

    def length_of(self, row: int) -> int:
        """Tokens of the row that are in the cache."""
        return self.rows[row].length

    def fork(self, row: int) -> int:
        """A new row that begins as a copy of `row` and shares its full pages. Raises OutOfPages."""
        self._not_in_batch("fork")
        return self.rows.fork(row)

    def crop_row(self, row: int, length: int) -> None:
        """Cut a row down to its first `length` tokens."""
        self._not_in_batch("crop_row")
        self.rows.crop(row, length)

    def free(self, row: int) -> None:
        """End a row. Pages that nobody else holds are free at once; full ones stay findable until they are needed."""
        self._not_in_batch("free")
        self.rows.free(row)

    def forget(self) -> None:
        """Let nothing that the pages hold be found any more, for what was told of them may not have been written: after
        a call that failed, or a change of weights. Rows go on."""
        self.rows.pages.forget()

    def check_opened(self) -> None:
        """Raise QwenoptError where the cache's rows are those of a batch."""
        self._not_in_batch("packed rows")

    def check_model(self, model: Any) -> None:
        """Raise QwenoptError unless the cache was made for a model like this one."""
        config, mine = model.config.get_text_config(decoder=True), self.config
        for name in ("num_hidden_layers", "num_key_value_heads", "head_dim", "layer_types", "sliding_window"):
            if getattr(config, name, None) != getattr(mine, name, None):
                raise QwenoptError(
                    f"paged cache: made for {name}={getattr(mine, name, None)}, the model has "
                    f"{getattr(config, name, None)}: it belongs to another model"
                )
        if model.dtype != self.dtype:
            raise QwenoptError(f"paged cache: made for {self.dtype}, the model is {model.dtype}")
        places = sorted({str(p.device) for p in model.parameters()})
        if places != [str(self.places.length.device)]:
            raise QwenoptError(
                f"paged cache: on {self.places.length.device}, the model on {', '.join(places)}; both must be on one"
            )

    def _not_in_batch(self, what: str) -> None:
        if self._batch:
            raise QwenoptError(
                f"paged cache: {what} while a batch of {len(self._batch)} rows is in the cache; reset() ends the batch"
            )

    # A batch whose rows are the cache's rows: transformers' own way.

    def reserve_batch(self, batch: int, seq: int, block_table: Tensor, length: Tensor, slots: Tensor) -> None:
        """What `qwenopt::kv_reserve` does. Raises with nothing changed."""
        opened = [] if self._batch else self._open_batch(batch)
        rows = self._batch or opened
        if len(rows) != batch:
            raise QwenoptError(
                f"paged cache: a batch of {batch} rows, but {len(rows)} are in the cache; reset() it, or use "
                "batch_select_indices"
            )
        try:
            self.rows.reserve(dict.fromkeys(rows, seq))
        except QwenoptError:
            for row in opened:
                self.rows.free(row)
            raise
        self._batch = rows
        where: list[int] = []
        for row in rows:
            where += self.rows.slots(row, seq)
            self.rows.advance(row, seq)
        slots[: len(where)].copy_(torch.tensor(where, dtype=torch.int64))
        length.add_(seq)
        self._write_table(block_table)

    def _open_batch(self, batch: int) -> list[int]:
        if len(self.rows):
            raise QwenoptError(
                f"paged cache: a batch of {batch} rows, while {len(self.rows)} opened rows are in the cache; free them "
                "or use a PackedBatch"
            )
        if batch > len(self._page_counts):
            raise QwenoptError(f"paged cache: a batch of {batch} rows; max_batch_size is {len(self._page_counts)}")
        return [self.rows.open(known=False) for _ in range(batch)]

    def _write_table(self, block_table: Tensor, *, anew: bool = False) -> None:
        """Bring the table up to date: what the rows' pages have grown by, or every line (`anew`)."""
        for line, row in enumerate(self._batch):
            pages, done = self.rows[row].pages, 0 if anew else self._page_counts[line]
            if len(pages) > done:
                fresh = torch.tensor(pages[done:], dtype=torch.int32)
                block_table[line, done : len(pages)].copy_(fresh)
            self._page_counts[line] = len(pages)

    def reset(self) -> None:
        """End all rows. What the pages hold stays findable until they are needed."""
        for row in list(self.rows):
            self.rows.free(row)
        self._batch = []
        self._page_counts = [0] * len(self._page_counts)
        self.places.length.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Cut the rows of the batch. The number means what it means to the installed transformers: how many tokens go,
        or, in older versions, how many stay (negative: how many go)."""
        length = self.rows[self._batch[0]].length if self._batch else 0
        if "tokens_to_remove" in inspect.signature(Cache.crop).parameters or tokens_to_remove < 0:
            length -= abs(tokens_to_remove)
        else:
            length = min(length, tokens_to_remove)
        if length < 0:
            raise QwenoptError(f"paged cache: {abs(tokens_to_remove)} tokens to remove, more than the rows have")
        self.rows.crop_all(self._batch, length)
        self.places.length.fill_(length)
        self._write_table(self.places.block_table, anew=True)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of what row `beam_idx[i]` was: pages are shared, only begun ones are copied."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows `indices` become the batch; none: the batch ends. Raises OutOfPages, with nothing changed."""
        if not self._batch:
            return
        wanted = indices.tolist()
        if not wanted:
            self.reset()
            return
        fits = all(isinstance(i, int) and 0 <= i < len(self._batch) for i in wanted)
        if not fits or len(wanted) > len(self._page_counts):
            raise QwenoptError(
                f"paged cache: rows {wanted} of a batch of {len(self._batch)}; max_batch_size is "
                f"{len(self._page_counts)}"
            )
        left = [row for i, row in enumerate(self._batch) if i not in wanted]
        begun = self.rows[self._batch[0]].length % self.page_size > 0
        copies = len(wanted) - len(set(wanted))
        if begun and copies > self.rows.pages.num_available + len(left):
            self.rows.pages.take(copies)  # raises
        for row in left:
            self.rows.free(row)
        seen: set[int] = set()
        new = []
        for i in wanted:
            new.append(self.rows.fork(self._batch[i]) if i in seen else self._batch[i])
            seen.add(i)
        self._batch = new
        self._write_table(self.places.block_table, anew=True)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch `repeats` times."""
        self.batch_select_indices(torch.arange(len(self._batch)).repeat_interleave(repeats))

    def stats(self) -> CacheStats:
        """Pages, tokens and bytes in use."""
        return stats_of(self.rows, sum(t.nbytes for t in self._tensors()))


def layer_types(config: Any) -> list[str]:
    """The kind of attention of each layer: "full_attention" or "sliding_attention"."""
    every = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return list(getattr(config, "layer_types", None) or [every] * config.num_hidden_layers)
