"""Pages: which pages of a pool are free, held, shared, or kept for what they contain. Host side, no tensors.

Pages are shared whole and never written while shared (Kwon et al., arXiv 2309.06180, section 4.3). A full page whose
tokens are known is published under the digest of all tokens up to its end; it stays findable after its last holder has
left, until its room is needed: then the page that was left longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from qwenopt.errors import QwenoptError


class OutOfPages(QwenoptError):
    """More pages are needed than are free. Nothing was changed; freeing a row or a larger `num_pages` helps."""


def digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a page's content: its tokens, and by `before` all that precede them."""
    text = ",".join(map(str, tokens)).encode()
    return blake2b(before + text, digest_size=16).digest()


class Pages:
    """Bookkeeping of `num_pages` pages."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.holders = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # published, held by nobody; the longest so first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Pages that can be taken: never used ones, and those only kept for their content."""
        return len(self._free) + len(self._idle)

    @property
    def num_kept(self) -> int:
        """Pages that nobody holds and whose content can still be found."""
        return len(self._idle)

    def take(self, count: int) -> list[int]:
        """Hold `count` pages of no content. Raises OutOfPages, with nothing taken."""
        if count > self.num_available:
            raise OutOfPages(
                f"paged cache: {count} more pages needed, {self.num_available} of {self.num_pages} are free; "
                "free rows, or make the cache with more num_pages"
            )
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._idle))
            del self._idle[page]
            self.unpublish(page)
        self.holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more holder of a page that is held or kept."""
        self._idle.pop(page, None)
        self.holders[page] += 1

    def drop(self, page: int) -> None:
        """One holder less; the last one leaves the page free, or kept if it is published."""
        self.holders[page] -= 1
        if self.holders[page] > 0:
            return
        if page in self._key_of:
            self._idle[page] = None
        else:
            self._free.append(page)

    def publish(self, page: int, key: bytes) -> None:
        """Let a full page be found by its content, unless another page of that content already is."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def unpublish(self, page: int) -> None:
        """The page's content is about to change."""
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]

    def find(self, key: bytes) -> int | None:
        """The page of that content, held or kept."""
        return self._page_of.get(key)

    def forget(self) -> None:
        """Nothing can be found any more; kept pages become free."""
        self._free += self._idle
        self._idle.clear()
        self._page_of.clear()
        self._key_of.clear()
