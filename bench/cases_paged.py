"""Arguments of the ops of a paged cache, for cases.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwenopt.testing.models import Shape

if TYPE_CHECKING:
    from cases import Case

RAGGED = [int(n) for n in torch.linspace(1, 4096, 16)]


def lengths_of(detail: str) -> tuple[list[int], int, bool]:
    """`16x2048-p16-int8`: keys of each row (`ragged`: 16 of 1 to 4096), page size, whether the pools hold int8."""
    rows, page, *kind = detail.split("-")
    if rows == "ragged":
        lengths = RAGGED
    else:
        count, length = map(int, rows.split("x"))
        lengths = [length] * count
    return lengths, int(page.removeprefix("p")), kind == ["int8"]


def make_pools(case: Case, pages: int, groups: int, page_size: int, dim: int, coded: bool) -> tuple[Any, ...]:
    """Pools full of noise."""
    from cases import noise

    shape = (pages, groups, page_size, dim)
    if not coded:
        return noise(case, *shape), noise(case, *shape, scale=0.5), None, None
    codes = [(noise(case, *shape).float() * 32).clamp(-127, 127).to(torch.int8) for _ in range(2)]
    return *codes, *(torch.full(shape[:3], 1 / 32) for _ in range(2))


def tokens_bytes(shape: Shape, case: Case, tokens: int, coded: bool) -> int:
    """Keys and values of so many tokens, as a pool holds them."""
    each = shape.head_dim + 4 if coded else shape.head_dim * case.dtype.itemsize
    return 2 * tokens * shape.kv_heads * each


def paged_attention(shape: Shape, case: Case) -> tuple[Any, int, int]:
    """How to make the arguments, with the pages of the rows in random order; bytes and operations."""
    from cases import noise

    lengths, page_size, coded = lengths_of(case.detail)
    queries, dim = case.tokens // len(lengths), shape.head_dim
    needed = [-(-n // page_size) for n in lengths]
    starts = (torch.arange(len(lengths) + 1) * queries).to(torch.int32)
    positions = torch.cat([torch.arange(n - queries, n) for n in lengths])

    def make() -> tuple[Any, ...]:
        order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(3)).to(torch.int32)
        table = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
        for row, own in enumerate(order.split(needed)):
            table[row, : len(own)] = own
        pools = make_pools(case, sum(needed), shape.kv_heads, page_size, dim, coded)
        q = noise(case, 1, case.tokens, shape.heads, dim).transpose(1, 2)
        return q, *pools, table, starts, positions, None, 0, dim**-0.5

    pairs = sum(queries * n - queries * (queries - 1) // 2 for n in lengths)
    num_bytes = (
        tokens_bytes(shape, case, sum(lengths), coded) + 2 * case.tokens * shape.heads * dim * case.dtype.itemsize
    )
    return make, num_bytes, 4 * pairs * shape.heads * dim


def kv_append(shape: Shape, case: Case) -> tuple[Any, int, int]:
    """Tokens to random slots of a pool of four times as many, or of 4096."""
    from cases import noise

    _, page_size, coded = lengths_of(case.detail)
    pages = max(4 * case.tokens, 4096) // page_size
    new: list[Tensor] = [noise(case, 1, case.tokens, shape.kv_heads, shape.head_dim) for _ in range(2)]

    def make() -> tuple[Any, ...]:
        slots = torch.randperm(pages * page_size, generator=torch.Generator().manual_seed(4))[: case.tokens]
        pools = make_pools(case, pages, shape.kv_heads, page_size, shape.head_dim, coded)
        return *pools, *(t.transpose(1, 2) for t in new), slots

    num_bytes = tokens_bytes(shape, case, case.tokens, False) + tokens_bytes(shape, case, case.tokens, coded)
    return make, num_bytes, 0
