"""Rows: sequences over shared pages. Host side, no tensors; what must be copied is told to the caller.

Between calls each row owns the page that its next token goes to alone, if that page is begun: forks and cuts copy at
once what would otherwise be shared and written. So a step only ever takes fresh pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qwenopt.errors import QwenoptError
from qwenopt.runtime.pages import Pages, digest


@dataclass
class Row:
    """A sequence: its pages, of which the first `length` places are taken, its tokens where they are known (else None),
    and the names of what its full pages hold."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    tokens: list[int] | None = None
    keys: list[bytes] = field(default_factory=list)


class Rows:
    """All rows over one pool of pages. Row names are numbers that are never used again.

    `copy_page(source, target)` is called to copy one page's content. `salt` goes into the names of contents: caches of
    other models or adapters must not find these pages.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        max_pages: int,
        copy_page: Callable[[int, int], object],
        salt: bytes = b"",
    ) -> None:
        self.page_size, self.max_pages, self.salt = page_size, max_pages, salt
        self.pages = Pages(num_pages)
        self._copy = copy_page
        self._rows: dict[int, Row] = {}
        self._next = 0

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Row:
        """The row of that name. Raises QwenoptError for one that was freed or never was."""
        if row not in self._rows:
            what = "was freed" if isinstance(row, int) and 0 <= row < self._next else "never was"
            raise QwenoptError(f"paged cache: row {row} {what}; rows in use: {sorted(self._rows) or 'none'}")
        return self._rows[row]

    def keys_of(self, tokens: Sequence[int]) -> list[bytes]:
        """Names of the contents of the full pages of `tokens`."""
        keys, size = [self.salt], self.page_size
        for at in range(0, len(tokens) // size * size, size):
            keys.append(digest(keys[-1], tokens[at : at + size]))
        return keys[1:]

    def open(self, tokens: Sequence[int] = (), *, known: bool = True) -> int:
        """A new row. It starts with the pages already there that hold the beginning of `tokens`, but never all of them:
        the last token is left, so that a model has something to compute the next one from.

        `known=False`: the tokens that come will not be told; the row's pages are never shared by content.
        """
        row = Row(tokens=[] if known else None)
        for key in self.keys_of(tokens[:-1]):
            page = self.pages.find(key)
            if page is None:
                break
            self.pages.hold(page)
            row.pages.append(page)
            row.keys.append(key)
        row.length = len(row.pages) * self.page_size
        if known:
            row.tokens = list(tokens[: row.length])
        return self._add(row)

    def _add(self, row: Row) -> int:
        self._rows[self._next] = row
        self._next += 1
        return self._next - 1

    def missing(self, row: int, count: int) -> int:
        """How many pages the row lacks for `count` more tokens. Raises QwenoptError where no row is that long."""
        r = self[row]
        needed = -(-(r.length + count) // self.page_size)
        if needed > self.max_pages:
            raise QwenoptError(
                f"paged cache: row {row} would have {r.length + count} tokens; a row holds at most "
                f"{self.max_pages * self.page_size}"
            )
        return max(needed - len(r.pages), 0)

    def reserve(self, counts: Mapping[int, int]) -> None:
        """Take pages so that each row has room for that many more tokens. Raises with nothing changed."""
        lacking = {row: self.missing(row, count) for row, count in counts.items()}
        fresh = iter(self.pages.take(sum(lacking.values())))
        for row, count in lacking.items():
            self[row].pages += [next(fresh) for _ in range(count)]

    def slots(self, row: int, count: int) -> list[int]:
        """Where the next `count` tokens go, as `page * page_size + place`; the room must have been reserved."""
        r, size = self[row], self.page_size
        return [r.pages[at // size] * size + at % size for at in range(r.length, r.length + count)]

    def advance(self, row: int, count: int, tokens: Sequence[int] | None = None) -> None:
        """Count `count` tokens as written. With their ids, full pages can be found by their content from now on."""
        r = self[row]
        if tokens is not None and len(tokens) != count:
            raise QwenoptError(f"paged cache: {count} tokens were written to row {row}, {len(tokens)} told")
        r.length += count
        if tokens is None or r.tokens is None:
            r.tokens = None
            return
        r.tokens += tokens
        while len(r.keys) < r.length // self.page_size:
            at = len(r.keys) * self.page_size
            before = r.keys[-1] if r.keys else self.salt
            r.keys.append(digest(before, r.tokens[at : at + self.page_size]))
            self.pages.publish(r.pages[len(r.keys) - 1], r.keys[-1])

    def fork(self, row: int) -> int:
        """A new row that begins as a copy of `row`: full pages are shared, a begun one is copied. Raises OutOfPages."""
        r = self[row]
        full = r.length // self.page_size
        pages = r.pages[:full]
        if r.length % self.page_size:
            (page,) = self.pages.take(1)
            self._copy(r.pages[full], page)
            pages = [*pages, page]
        for page in r.pages[:full]:
            self.pages.hold(page)
        return self._add(Row(pages, r.length, None if r.tokens is None else list(r.tokens), list(r.keys)))

    def crop(self, row: int, length: int) -> None:
        """Cut the row down to its first `length` tokens. Raises as `crop_all` does."""
        self.crop_all([row], length)

    def crop_all(self, names: Sequence[int], length: int) -> None:
        """Cut each of the rows down to its first `length` tokens. Raises OutOfPages, with nothing changed, where pages
        that the next tokens would go to are shared and there are not enough free ones for copies of them."""
        rows = [self[name] for name in names]
        for name, r in zip(names, rows, strict=True):
            if not isinstance(length, int) or not 0 <= length <= r.length:
                raise QwenoptError(f"paged cache: row {name} has {r.length} tokens; it cannot be cut to {length}")
        full, begun = divmod(length, self.page_size)
        end = full + (begun > 0)
        gone = Counter(page for r in rows for page in r.pages[end:])
        written = Counter(r.pages[full] for r in rows) if begun else Counter[int]()
        holders = self.pages.holders
        copies = sum(count - (holders[page] == count) for page, count in written.items())
        if copies > self.pages.num_available + sum(holders[page] == count for page, count in gone.items()):
            self.pages.take(copies)  # raises
        for page in gone.elements():
            self.pages.drop(page)
        for r in rows:
            r.pages, r.length = r.pages[:end], length
            if begun:
                self._own_last(r.pages)
            if r.tokens is not None:
                del r.tokens[length:]
            del r.keys[full:]

    def _own_last(self, pages: list[int]) -> None:
        """Make the last page one that may be written: a copy where others hold it."""
        if self.pages.holders[pages[-1]] == 1:
            self.pages.unpublish(pages[-1])
            return
        (page,) = self.pages.take(1)
        self._copy(pages[-1], page)
        self.pages.drop(pages[-1])
        pages[-1] = page

    def free(self, row: int) -> None:
        """End the row: its name is gone, and its pages are free or left to those who share them."""
        pages = self[row].pages
        del self._rows[row]
        for page in reversed(pages):  # the end of a sequence is the first to lose its pages
            self.pages.drop(page)
