"""Arguments of products of weights, for cases.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qwenopt.testing.models import Shape

if TYPE_CHECKING:
    from cases import Case

Made = tuple[Callable[[], tuple[Any, ...]], int, int]  # how to make the arguments; bytes and operations


def linear(shape: Shape, case: Case) -> Made:
    """`detail` names the matrix."""
    from cases import noise

    rows, columns = {
        "q_proj": (shape.heads * shape.head_dim, shape.hidden),
        "gate_proj": (shape.intermediate, shape.hidden),
        "down_proj": (shape.hidden, shape.intermediate),
        "lm_head": (shape.vocab, shape.hidden),
    }[case.detail]
    x = noise(case, 1, case.tokens, columns)
    num_bytes = rows * columns * case.dtype.itemsize
    io_bytes = case.tokens * (rows + columns) * case.dtype.itemsize
    return (
        lambda: (x, noise(case, rows, columns, scale=columns**-0.5), None),
        num_bytes + io_bytes,
        2 * case.tokens * rows * columns,
    )


def linear_group(shape: Shape, case: Case) -> Made:
    from cases import noise

    rows = [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2]
    k = shape.hidden
    x = noise(case, 1, case.tokens, k)
    num_bytes = sum(rows) * k * case.dtype.itemsize
    io_bytes = case.tokens * (sum(rows) + k) * case.dtype.itemsize
    return (
        lambda: (x, [noise(case, n, k, scale=k**-0.5) for n in rows]),
        num_bytes + io_bytes,
        2 * case.tokens * sum(rows) * k,
    )


def linear_silu_mul(shape: Shape, case: Case) -> Made:
    from cases import noise

    n, k = shape.intermediate, shape.hidden
    x = noise(case, 1, case.tokens, k)
    num_bytes = 2 * n * k * case.dtype.itemsize
    io_bytes = case.tokens * (n + k) * case.dtype.itemsize
    return (
        lambda: (x, *(noise(case, n, k, scale=k**-0.5) for _ in range(2))),
        num_bytes + io_bytes,
        4 * case.tokens * n * k,
    )


def linear_add_rms_norm(shape: Shape, case: Case) -> Made:
    """The end of an MLP and the norm of the next layer."""
    from cases import EPS, noise, norm_weight

    n, k = shape.hidden, shape.intermediate
    x, residual, norm = noise(case, 1, case.tokens, k), noise(case, 1, case.tokens, n), norm_weight(case, n)
    num_bytes = n * k * case.dtype.itemsize
    io_bytes = x.nbytes + 3 * residual.nbytes + norm.nbytes
    return (
        lambda: (x, noise(case, n, k, scale=k**-0.5), residual, norm, EPS),
        num_bytes + io_bytes,
        2 * case.tokens * n * k,
    )


def linear_argmax(shape: Shape, case: Case) -> Made:
    """The end of a greedy step, on whole numbers: their products are exact in any order, and so is the choice."""
    from cases import noise

    n, k = shape.vocab, shape.hidden
    x = noise(case, 1, case.tokens, k).clamp(-1, 1).round()
    num_bytes = n * k * case.dtype.itemsize
    return (
        lambda: (x, noise(case, n, k).clamp(-2, 2).round(), None),
        num_bytes + x.nbytes + 8 * case.tokens,
        2 * case.tokens * n * k,
    )
