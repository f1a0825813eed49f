"""Rows and pages against a plain model of them: no page is lost, none is shared and written, nothing half done."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from qwenopt.errors import QwenoptError
from qwenopt.runtime.pages import OutOfPages
from qwenopt.runtime.rows import Rows

NUM_PAGES, SIZE, MAX_PAGES = 12, 4, 6


class Memory:
    """What lies in the pages, as the caller of Rows keeps it: a token at each place."""

    def __init__(self) -> None:
        self.places = [[-1] * SIZE for _ in range(NUM_PAGES)]
        self.rows = Rows(NUM_PAGES, SIZE, MAX_PAGES, self.copy)

    def copy(self, source: int, target: int) -> None:
        self.places[target] = list(self.places[source])

    def write(self, row: int, tokens: list[int], known: bool = True) -> None:
        self.rows.reserve({row: len(tokens)})
        for slot, token in zip(self.rows.slots(row, len(tokens)), tokens, strict=True):
            page, place = divmod(slot, SIZE)
            assert self.rows.pages.holders[page] == 1, "a shared page is written"
            assert page not in self.rows.pages._key_of, "a page is written that can be found by its content"
            self.places[page][place] = token
        self.rows.advance(row, len(tokens), tokens if known else None)

    def read(self, row: int) -> list[int]:
        r = self.rows[row]
        return [self.places[r.pages[i // SIZE]][i % SIZE] for i in range(r.length)]


tokens = st.lists(st.integers(0, 1), max_size=9)


class RowsMachine(RuleBasedStateMachine):
    """Random calls; the model is what each row's tokens should be."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()
        self.model: dict[int, list[int]] = {}

    def pick(self, data: st.DataObject) -> int | None:
        return data.draw(st.sampled_from(sorted(self.model))) if self.model else None

    def state(self) -> tuple[object, ...]:
        pages = self.memory.rows.pages
        rows = {name: tuple(self.memory.rows[name].pages) for name in self.memory.rows}
        return rows, tuple(pages.holders), pages.num_available, [list(p) for p in self.memory.places]

    @rule(prompt=tokens, known=st.booleans())
    def open(self, prompt: list[int], known: bool) -> None:
        before = self.memory.rows.pages.num_available
        row = self.memory.rows.open(prompt if known else (), known=known)
        found = self.memory.rows[row].length
        assert found % SIZE == 0
        assert found <= max(len(prompt) - 1, 0)
        assert self.memory.read(row) == prompt[:found]
        assert before - self.memory.rows.pages.num_available <= found // SIZE
        self.model[row] = prompt[:found]

    @rule(new=tokens, known=st.booleans(), data=st.data())
    def write(self, new: list[int], known: bool, data: st.DataObject) -> None:
        row = self.pick(data)
        if row is None:
            return
        before = self.state()
        try:
            self.memory.write(row, new, known)
        except QwenoptError as error:
            assert self.state() == before, "an error left something changed"
            length = len(self.model[row]) + len(new)
            assert isinstance(error, OutOfPages) or length > MAX_PAGES * SIZE  # noqa: PT017
            return
        self.model[row] = self.model[row] + new

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        row = self.pick(data)
        if row is None:
            return
        before = self.state()
        try:
            twin = self.memory.rows.fork(row)
        except OutOfPages:
            assert self.state() == before
            assert self.memory.rows.pages.num_available == 0
            return
        self.model[twin] = list(self.model[row])

    @rule(data=st.data(), keep=st.floats(0, 1))
    def crop(self, data: st.DataObject, keep: float) -> None:
        row = self.pick(data)
        if row is None:
            return
        length, before = int(keep * len(self.model[row])), self.state()
        try:
            self.memory.rows.crop(row, length)
        except OutOfPages:
            assert self.state() == before
            return
        self.model[row] = self.model[row][:length]

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        row = self.pick(data)
        if row is None:
            return
        self.memory.rows.free(row)
        del self.model[row]
        with pytest.raises(QwenoptError, match=f"row {row} was freed"):
            self.memory.rows.slots(row, 1)

    @invariant()
    def rows_hold_what_was_written(self) -> None:
        assert set(self.memory.rows) == set(self.model)
        for row, wanted in self.model.items():
            assert self.memory.read(row) == wanted

    @invariant()
    def no_page_is_lost(self) -> None:
        rows, pages = self.memory.rows, self.memory.rows.pages
        held = Counter(page for row in rows for page in rows[row].pages)
        assert pages.holders == [held[page] for page in range(NUM_PAGES)]
        free = [*pages._free, *pages._idle]
        assert sorted([*free, *held]) == list(range(NUM_PAGES)), "a page is neither free nor held, or both"
        assert len(set(held)) + pages.num_available == NUM_PAGES

    @invariant()
    def what_can_be_found_is_there(self) -> None:
        pages = self.memory.rows.pages
        for key, page in pages._page_of.items():
            assert pages._key_of[page] == key
            assert pages.holders[page] > 0 or page in pages._idle

    @invariant()
    def begun_pages_are_owned(self) -> None:
        for row in self.memory.rows:
            r = self.memory.rows[row]
            if r.length % SIZE:
                assert self.memory.rows.pages.holders[r.pages[r.length // SIZE]] == 1


RowsMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50)  # 10,000 steps
TestRows = RowsMachine.TestCase


def test_equal_beginnings_share_pages() -> None:
    memory = Memory()
    prompt = list(range(10))
    first = memory.rows.open(prompt)
    memory.write(first, prompt)
    second = memory.rows.open(prompt)
    assert memory.rows[second].length == 8
    assert memory.rows[second].pages == memory.rows[first].pages[:2]
    assert memory.rows[memory.rows.open([99, *prompt])].length == 0, "the same tokens elsewhere are other content"


def test_content_outlives_its_rows_until_its_room_is_needed() -> None:
    memory = Memory()
    prompt = list(range(9))
    row = memory.rows.open(prompt)
    memory.write(row, prompt)
    memory.rows.free(row)
    assert memory.rows.pages.num_available == NUM_PAGES
    assert memory.rows.pages.num_kept == 2
    again = memory.rows.open(prompt)
    assert memory.rows[again].length == 8
    memory.rows.free(again)
    fillers = [memory.rows.open([100 + i]) for i in range(2)]
    for filler in fillers:
        memory.write(filler, [7] * MAX_PAGES * SIZE)
    assert memory.rows[memory.rows.open(prompt)].length == 0


def test_a_salt_sets_contents_apart() -> None:
    plain, adapted = Rows(4, 4, 4, lambda a, b: None), Rows(4, 4, 4, lambda a, b: None, salt=b"adapter")
    assert plain.keys_of([1, 2, 3, 4]) != adapted.keys_of([1, 2, 3, 4])


def test_errors_say_what_is_needed() -> None:
    memory = Memory()
    row = memory.rows.open()
    with pytest.raises(QwenoptError, match="row 0 would have 25 tokens; a row holds at most 24"):
        memory.rows.reserve({row: 25})
    others = [memory.rows.open() for _ in range(2)]
    with pytest.raises(OutOfPages, match="18 more pages needed, 12 of 12 are free"):
        memory.rows.reserve({r: 24 for r in (row, *others)})
    assert memory.rows.pages.num_available == NUM_PAGES
    with pytest.raises(QwenoptError, match="row 7 never was; rows in use: "):
        memory.rows.fork(7)
    with pytest.raises(QwenoptError, match="has 0 tokens; it cannot be cut to 3"):
        memory.rows.crop(row, 3)
