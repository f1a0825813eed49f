"""What a paged cache holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from qwenopt.runtime.rows import Rows


@dataclass(frozen=True)
class CacheStats:
    """What a paged cache holds: numbers of pages and tokens, and bytes of memory.

    `kept` pages belong to nobody and can still be found by their content; `shared` ones have more than one holder.
    `fragmentation` is the part of the used pages' places that holds no token.
    """

    pages: int
    used: int
    shared: int
    kept: int
    free: int
    rows: int
    tokens: int
    fragmentation: float
    nbytes: int
    used_nbytes: int


def stats_of(rows: Rows, nbytes: int) -> CacheStats:
    """The numbers of these rows and their pages, which take `nbytes` in all."""
    pages, size = rows.pages, rows.page_size
    used = pages.num_pages - pages.num_available
    held: dict[int, int] = {}  # tokens in each page; of a page with several holders, what the longest of them sees
    for row in rows:
        for i, page in enumerate(rows[row].pages):
            held[page] = max(held.get(page, 0), min(rows[row].length - i * size, size))
    tokens = sum(held.values())
    return CacheStats(
        pages=pages.num_pages,
        used=used,
        shared=sum(count > 1 for count in pages.holders),
        kept=pages.num_kept,
        free=pages.num_available - pages.num_kept,
        rows=len(rows),
        tokens=tokens,
        fragmentation=1 - tokens / (used * size) if used else 0.0,
        nbytes=nbytes,
        used_nbytes=nbytes // pages.num_pages * used,
    )
