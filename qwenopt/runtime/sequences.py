"""Which tokens of which sequences a step computes: prompts in pieces, replies one by one, equal beginnings once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwenopt.errors import QwenoptError
from qwenopt.runtime.paged_cache import PagedKVCache
from qwenopt.runtime.pages import OutOfPages


@dataclass(eq=False)
class Request:
    """One sequence on its way: its prompt, its reply so far, and its row in the cache while it is worked on."""

    index: int
    prompt: list[int]
    max_new_tokens: int
    reply: list[int] = field(default_factory=list)
    row: int | None = None
    keys: list[bytes] = field(default_factory=list)  # names of the prompt's full pages, the last token left out
    done: int = 0  # tokens that are in the cache, or will be after the present step

    @property
    def left(self) -> int:
        """Tokens that are known and not in the cache."""
        return len(self.prompt) + len(self.reply) - self.done

    def take(self, most: int) -> list[int]:
        """The next tokens to compute, up to `most`; they count as done."""
        begin, end, size = self.done, self.done + min(self.left, most), len(self.prompt)
        self.done = end
        return self.prompt[begin:end] + self.reply[max(begin - size, 0) : max(end - size, 0)]


class Schedule:
    """Which requests are worked on, each on a line of the batch.

    A request waits, in the order of arrival, until a line is free and pages for all of its prompt and reply are: one
    that has begun always ends. One whose prompt begins as another's that is being read waits for that, and then shares
    its pages.
    """

    def __init__(self, cache: PagedKVCache, requests: Sequence[Request], num_lines: int) -> None:
        self.cache = cache
        self.waiting = list(requests)
        self.lines: list[Request | None] = [None] * num_lines
        for request in requests:
            self._check_fits(request)
            request.keys = cache.rows.keys_of(request.prompt[:-1])

    def _total_pages(self, request: Request) -> int:
        # The last token of a reply is never computed.
        return -(-(len(request.prompt) + request.max_new_tokens - 1) // self.cache.page_size)

    def _check_fits(self, request: Request) -> None:
        tokens, pages = len(request.prompt) + request.max_new_tokens, self._total_pages(request)
        rows = self.cache.rows
        if pages > rows.max_pages:
            raise QwenoptError(
                f"generate: prompt {request.index} and its reply are {tokens} tokens; the cache takes rows of "
                f"{rows.max_pages * self.cache.page_size}"
            )
        if pages > self.cache.num_pages:
            raise OutOfPages(
                f"generate: prompt {request.index} and its reply need {pages} pages, the cache has "
                f"{self.cache.num_pages}; make it with more num_pages"
            )

    @property
    def working(self) -> list[Request]:
        """The requests on lines."""
        return [r for r in self.lines if r is not None]

    def admit(self) -> list[tuple[int, Request]]:
        """Give lines to requests that can begin; returns those lines and requests."""
        begun = []
        for request in list(self.waiting):
            if None not in self.lines:
                break
            if self._comes_soon(request.keys):
                continue
            if not self._has_room(request, request.keys):
                break
            request.row = self.cache.open(request.prompt)
            request.done = self.cache.length_of(request.row)
            line = self.lines.index(None)
            self.lines[line] = request
            self.waiting.remove(request)
            begun.append((line, request))
        if not begun and not self.working and self.waiting:
            raise OutOfPages(
                f"generate: prompt {self.waiting[0].index} needs {self._total_pages(self.waiting[0])} pages; "
                f"{self.cache.rows.pages.num_available} of {self.cache.num_pages} are free: other rows hold the rest"
            )
        return begun

    def _found(self, keys: Sequence[bytes]) -> list[int]:
        """The pages that hold the beginning of a prompt."""
        found = []
        for key in keys:
            page = self.cache.rows.pages.find(key)
            if page is None:
                break
            found.append(page)
        return found

    def _comes_soon(self, keys: Sequence[bytes]) -> bool:
        """Whether a prompt that is being read will leave the next page that this one could share."""
        at = len(self._found(keys))
        if at >= len(keys):
            return False
        reading = (r for r in self.working if r.done < len(r.prompt) - 1)
        return any(keys[at] in r.keys[at : at + 1] for r in reading)

    def _has_room(self, request: Request, keys: Sequence[bytes]) -> bool:
        pages, found = self.cache.rows.pages, self._found(keys)
        kept = sum(pages.holders[page] == 0 for page in found)
        promised = 0  # to the requests at work
        for other in self.working:
            assert other.row is not None
            promised += self._total_pages(other) - len(self.cache.rows[other.row].pages)
        return self._total_pages(request) - len(found) + kept + promised <= pages.num_available

    def end(self, line: int) -> None:
        """The request on that line has its reply: its pages and its line are free."""
        request = self.lines[line]
        assert request is not None
        assert request.row is not None
        self.cache.free(request.row)
        self.lines[line], request.row = None, None

    def close(self) -> None:
        """Free what is still on lines: the generation ends early."""
        for line, request in enumerate(self.lines):
            if request is not None:
                self.end(line)

    def pieces(self, most: int) -> list[tuple[int | None, list[int]]]:
        """For each line its row and the tokens of the next step, `most` in all: replies go first, then prompts."""
        order = sorted((r.left > 1, line) for line, r in enumerate(self.lines) if r is not None)
        pieces: list[tuple[int | None, list[int]]] = [(None, [])] * len(self.lines)
        for _, line in order:
            request = self.lines[line]
            assert request is not None
            pieces[line] = (request.row, request.take(most))
            most -= len(pieces[line][1])
        return pieces

    @property
    def reading(self) -> bool:
        """Whether some prompt is not through yet."""
        return any(r.left > 1 for r in self.working)
