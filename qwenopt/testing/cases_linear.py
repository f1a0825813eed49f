"""The cases of products of weights; see cases.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

EPS = 1e-6


def _linear(rows: tuple[int, ...], k: int, n: int, bias: bool = False) -> tuple[Any, ...]:
    return torch.randn(*rows, k), torch.randn(n, k) * k**-0.5, torch.randn(n) if bias else None


def _integers(rows: tuple[int, ...], k: int, n: int, bias: bool = False) -> tuple[Any, ...]:
    """A product without rounding, of which many results are equal: even bfloat16 has all whole numbers to 256."""
    x, weight = torch.randint(-1, 2, (*rows, k)), torch.randint(-2, 3, (n, k))
    return x.float(), weight.float(), torch.randint(-2, 3, (n,)).float() if bias else None


def _group(rows: tuple[int, ...], k: int, *columns: int) -> tuple[Any, ...]:
    return torch.randn(*rows, k), [torch.randn(n, k) * k**-0.5 for n in columns]


def _gated(rows: tuple[int, ...], k: int, n: int) -> tuple[Any, ...]:
    return torch.randn(*rows, k), 3 * torch.randn(n, k) * k**-0.5, torch.randn(n, k) * k**-0.5


def _linear_norm(rows: tuple[int, ...], k: int, n: int) -> tuple[Any, ...]:
    x, weight = torch.randn(*rows, k), torch.randn(n, k) * k**-0.5
    return x, weight, torch.randn(*rows, n), 1 + 0.2 * torch.randn(n), EPS


LINEARS: dict[str, dict[str, Callable[[], tuple[Any, ...]]]] = {
    "linear": {
        "decode": lambda: _linear((1, 1), 1024, 640),
        "batch": lambda: _linear((8, 1), 96, 130),
        "rows past the kernel": lambda: _linear((40,), 64, 48),
        "odd": lambda: _linear((3,), 37, 19),
        "bias": lambda: _linear((2, 3), 64, 48, bias=True),
        "vector": lambda: _linear((), 64, 48),
        "no rows": lambda: _linear((0,), 64, 48),
        "one column": lambda: _linear((2,), 64, 1),
    },
    "linear_group": {
        "decode": lambda: _group((1, 1), 512, 256, 64, 64),
        "batch": lambda: _group((8, 1), 96, 130, 32, 32),
        "two": lambda: _group((2, 3), 64, 48, 48),
        "rows past the kernel": lambda: _group((40,), 64, 48, 16, 16),
        "odd": lambda: _group((3,), 37, 19, 1, 7),
        "vector": lambda: _group((), 64, 48, 16, 16),
        "no rows": lambda: _group((0,), 64, 48, 16, 16),
    },
    "linear_silu_mul": {
        "decode": lambda: _gated((1, 1), 512, 384),
        "batch": lambda: _gated((8, 1), 96, 130),
        "rows past the kernel": lambda: _gated((40,), 64, 48),
        "odd": lambda: _gated((3,), 37, 19),
        "vector": lambda: _gated((), 64, 48),
        "no rows": lambda: _gated((0,), 64, 48),
        "one column": lambda: _gated((2,), 64, 1),
    },
    "linear_add_rms_norm": {
        "decode": lambda: _linear_norm((1, 1), 512, 256),
        "batch": lambda: _linear_norm((8, 1), 1024, 130),
        "rows past the kernel": lambda: _linear_norm((40,), 64, 48),
        "odd": lambda: _linear_norm((3,), 37, 19),
        "no rows": lambda: _linear_norm((0,), 64, 48),
    },
    "linear_argmax": {
        "decode": lambda: _integers((1, 1), 512, 640),
        "batch": lambda: _integers((1, 8), 96, 130),
        "rows past the kernel": lambda: _integers((40,), 64, 48),
        "odd": lambda: _integers((3,), 37, 19),
        "bias": lambda: _integers((2, 3), 64, 48, bias=True),
        "vector": lambda: _integers((), 64, 48),
        "no rows": lambda: _integers((0,), 64, 48),
        "one column": lambda: _integers((2,), 64, 1),
    },
}
