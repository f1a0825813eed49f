"""PackedBatch by hand: forks and cuts give the numbers of rows of their own; what does not fit changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qwenopt
from qwenopt.errors import QwenoptError
from qwenopt.runtime.packed_batch import PackedBatch
from qwenopt.runtime.pages import OutOfPages
from qwenopt.testing.models import tiny_model
from qwenopt.testing.tolerance import assert_near_eager

PROMPT = [i * 7 % 128 for i in range(40)]
Lines = list[tuple[int | None, list[int]]]


class Rows:
    """A model, a cache and a batch; `step` gives the logits behind the last token of each line."""

    def __init__(self, **changes: Any) -> None:
        self.model = tiny_model("0.6B")
        sizes = {"max_batch_size": 4, "num_pages": 32} | changes
        self.cache = qwenopt.PagedKVCache(self.model.config, dtype=torch.float32, **sizes)
        self.batch = PackedBatch(self.cache, 3, 64, dynamic=True)

    def step(self, *lines: tuple[int | None, list[int]]) -> Tensor:
        self.batch.fill(lines)
        places, masks = self.batch.places, self.batch.masks()
        with torch.no_grad():
            out = self.model(
                places.ids[None],
                position_ids=places.positions[None],
                attention_mask=masks,
                past_key_values=self.batch,
            )
        return out.logits[0, places.last]  # type: ignore[no-any-return]

    def alone(self, *pieces: list[int]) -> Tensor:
        """The logits behind a row of its own that was written in these pieces."""
        row = self.cache.open()
        for piece in pieces:
            logits = self.step((row, piece))[0]
        self.cache.free(row)
        return logits


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=["float32", "int8"])
@pytest.mark.parametrize("page_size", [16, 24, 1])
def test_forks_and_cuts_give_the_numbers_of_rows_of_their_own(page_size: int, kv_dtype: torch.dtype | None) -> None:
    changes = {"page_size": page_size, "num_pages": 512 // page_size, "kv_dtype": kv_dtype}
    rows, apart = Rows(**changes), Rows(**changes)
    row = rows.cache.open()
    rows.step((row, PROMPT))
    fork = rows.cache.fork(row)
    found = rows.step((row, [7, 8]), (fork, [9]))
    rows.cache.crop_row(fork, 35)  # into a page that the first row holds
    again = rows.step((fork, PROMPT[35:] + [9]))
    rest = rows.step((row, [3]))
    wanted = [apart.alone(PROMPT, [7, 8]), apart.alone(PROMPT, [9]), apart.alone(PROMPT, [7, 8], [3])]
    # The same products over the same values, in another order at most.
    for a, b in [(found[0], wanted[0]), (found[1], wanted[1]), (again[0], wanted[1]), (rest[0], wanted[2])]:
        assert_near_eager(a, b)


def test_rows_without_tokens_and_a_reset_beside_forks() -> None:
    rows = Rows()
    row = rows.cache.open()
    fork = rows.cache.fork(row)
    assert rows.cache.stats().used == 0
    assert_near_eager(rows.step((row, PROMPT), (fork, PROMPT[:5]))[1], rows.alone(PROMPT[:5]))
    shared = rows.cache.fork(row)
    rows.cache.reset()
    for gone in (row, fork, shared):
        with pytest.raises(QwenoptError, match=f"row {gone} was freed; rows in use: none"):
            rows.batch.fill([(gone, [1])])
    assert (rows.cache.stats().used, rows.cache.stats().shared) == (0, 0)
    assert_near_eager(rows.alone(PROMPT), Rows().alone(PROMPT))


REFUSED: list[tuple[str, Lines, type[Exception], str]] = [
    ("out of pages", [(0, [1]), (1, [1] * 60)], OutOfPages, "3 more pages needed, 1 of 4 are free"),
    ("a row that is too long", [(0, [1]), (1, [1] * 62)], QwenoptError, "row 1 would have 81 tokens; .* at most 80"),
    ("a freed row", [(0, [1]), (2, [1])], QwenoptError, r"row 2 was freed; rows in use: \[0, 1\]"),
    ("a row that never was", [(0, [1]), (9, [1])], QwenoptError, "row 9 never was"),
    ("no row", [("a", [1])], QwenoptError, "row a never was"),  # type: ignore[list-item]
    ("a row twice", [(0, [1]), (0, [1])], QwenoptError, r"rows \[0, 0\]; a row can be on one line only"),
    (
        "a token of no vocabulary",
        [(0, [1, 128])],
        QwenoptError,
        "token 128 for row 0; need whole numbers from 0 to 127",
    ),
    ("part of a token", [(0, [1.5])], QwenoptError, "token 1.5 for row 0; need whole numbers"),  # type: ignore[list-item]
    ("too many lines", [(0, [1]), (1, [1]), (None, []), (None, [])], QwenoptError, "2 tokens of 4 rows; this batch"),
]


@pytest.mark.parametrize(("what", "lines", "error", "text"), REFUSED, ids=[r[0] for r in REFUSED])
def test_what_does_not_fit_changes_nothing(what: str, lines: Lines, error: type[Exception], text: str) -> None:
    rows = Rows(num_pages=4, max_length=80)
    first, second, gone = (rows.cache.open() for _ in range(3))
    rows.step((first, PROMPT[:5]), (second, PROMPT[:19]))
    rows.cache.free(gone)
    tensors = [t for pools in rows.cache.pools for t in pools[:2]]
    before, stats = [t.clone() for t in tensors], rows.cache.stats()
    with pytest.raises(error, match=text):
        rows.step(*lines)
    assert rows.cache.stats() == stats
    assert all(map(torch.equal, tensors, before))
    rows.cache.free(first)
    assert_near_eager(rows.step((second, PROMPT[19:]))[0], Rows().alone(PROMPT[:19], PROMPT[19:]))


def test_cuts_that_need_more_pages_than_are_free_change_no_row() -> None:
    rows = Rows(num_pages=3, page_size=32)
    row = rows.cache.open()
    rows.step((row, PROMPT[:32]))
    forks = [rows.cache.fork(row), rows.cache.fork(row)]
    rows.cache.rows.pages.take(1)
    before = [list(rows.cache.rows[r].pages) for r in (row, *forks)]
    with pytest.raises(OutOfPages, match="2 more pages needed, 1 of 3 are free"):
        rows.cache.rows.crop_all([row, *forks], 20)
    assert [rows.cache.rows[r].pages for r in (row, *forks)] == before
    rows.cache.free(forks.pop())
    rows.cache.rows.crop_all([row, *forks], 20)  # one copy, and the last holder keeps the page
    assert rows.cache.rows.pages.num_available == 0
    assert [rows.cache.length_of(r) for r in (row, *forks)] == [20, 20]


def test_a_batch_of_no_rows_is_refused() -> None:
    with pytest.raises(QwenoptError, match="num_rows=0; need a whole number of at least 1"):
        PackedBatch(Rows().cache, 0, 1)
