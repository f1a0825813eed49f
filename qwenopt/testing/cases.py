"""Arguments for every op: the shapes that Qwen3 has, in small, and the odd ones that break kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwenopt.testing.cases_linear import LINEARS
from qwenopt.testing.cases_paged import PAGED, Scales

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """A named set of arguments of one op; `build(dtype)` makes them, the same ones each time."""

    op: str
    name: str
    make: Callable[[], tuple[Any, ...]]

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        """Fresh arguments, floating point ones in `dtype`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(map(ord, self.op + self.name)))
            args = self.make()
        return tuple(_cast(a, dtype) for a in args)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Scales):
        return value.tensor
    if isinstance(value, torch.dtype):
        return dtype
    if isinstance(value, list):
        return [_cast(one, dtype) for one in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _norm(*shape: int) -> tuple[Any, ...]:
    return torch.randn(shape), 1 + 0.2 * torch.randn(shape[-1]), EPS


def _add_norm(*shape: int) -> tuple[Any, ...]:
    return torch.randn(shape), torch.randn(shape), 1 + 0.2 * torch.randn(shape[-1]), EPS


def _gate(*shape: int) -> tuple[Any, ...]:
    return 3 * torch.randn(shape), torch.randn(shape)


def _rope(batch: int, seq: int, heads: int, groups: int, dim: int, tables: int = 1) -> tuple[Any, ...]:
    angle = (6 * torch.rand(tables, seq, dim // 2)).repeat(1, 1, 2)
    q, k = torch.randn(batch, seq, heads, dim), torch.randn(batch, seq, groups, dim)
    return q, k, 1 + 0.2 * torch.randn(dim), 1 + 0.2 * torch.randn(dim), angle.cos(), angle.sin(), EPS


def qkv(batch: int, heads: int, groups: int, seq: int, length: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, laid out as a model lays them out: transposed from [B, S, heads, D]."""
    shapes = ((seq, heads), (length, groups), (length, groups))
    q, k, v = (torch.randn(batch, n, h, dim).transpose(1, 2) for n, h in shapes)
    return q, k, v


def _attention(
    sizes: tuple[int, int, int, int, int, int],
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    causal: bool = False,
) -> tuple[Any, ...]:
    return (*qkv(*sizes), mask, positions, causal, sizes[-1] ** -0.5)


def left_padding(batch: int, seq: int, length: int) -> Tensor:
    """A causal mask [B, 1, S, L] whose row b hides the first b keys; queries in the padding see nothing."""
    causal = torch.arange(length) <= (torch.arange(seq) + length - seq)[:, None]
    return causal & (torch.arange(length) >= torch.arange(batch)[:, None, None, None])


def _experts(tokens: int, experts: int, top_k: int, hidden: int, inter: int, highest: int = 0) -> tuple[Any, ...]:
    """Distinct ids below `highest` (default: all experts) for each token."""
    indices = torch.rand(tokens, highest or experts).argsort(-1)[:, :top_k].contiguous()
    gate_up, down = torch.randn(experts, 2 * inter, hidden), torch.randn(experts, hidden, inter)
    weights = torch.rand(tokens, top_k)
    return torch.randn(tokens, hidden), indices, weights, gate_up * hidden**-0.5, down * inter**-0.5


def _sentinel() -> tuple[Any, ...]:
    x, indices, weights, gate_up, down = _experts(6, 8, 3, 32, 16)
    indices[1, 0] = indices[4] = 8  # one slot of token 1 and all of token 4 belong to another rank
    return x, indices, weights, gate_up, down


def _repeating(rows: int, size: int) -> Tensor:
    """Logits of which many are equal, the largest too."""
    return (4 * torch.randn(rows, size)).round().clamp(max=6)


def _partly_hidden(rows: int, size: int) -> Tensor:
    """Logits of which all but every third are -inf."""
    return torch.randn(rows, size).masked_fill(torch.arange(size) % 3 > 0, -torch.inf)


_MAKERS: dict[str, dict[str, Callable[[], tuple[Any, ...]]]] = {
    "rms_norm": {
        "decode": lambda: _norm(1, 1, 1024),
        "prefill": lambda: _norm(2, 9, 96),
        "odd": lambda: _norm(3, 5, 37),
        "vector": lambda: _norm(64),
        "one column": lambda: _norm(4, 1),
        "no rows": lambda: _norm(0, 32),
        "tiny values": lambda: (1e-6 * torch.randn(4, 64), torch.ones(64), EPS),
        "large values": lambda: (1e4 * torch.randn(4, 64), torch.ones(64), EPS),
        "zeros": lambda: (torch.zeros(4, 64), torch.ones(64), EPS),
    },
    "add_rms_norm": {
        "decode": lambda: _add_norm(1, 1, 1024),
        "prefill": lambda: _add_norm(2, 9, 96),
        "odd": lambda: _add_norm(3, 5, 37),
        "no rows": lambda: _add_norm(0, 32),
    },
    "silu_mul": {
        "decode": lambda: _gate(1, 1, 3072),
        "prefill": lambda: _gate(2, 9, 96),
        "odd": lambda: _gate(3, 37),
        "no rows": lambda: _gate(0, 32),
        "far out": lambda: (torch.tensor([[-200.0, -88.0, -0.0, 0.0, 88.0, 200.0]]), torch.ones(1, 6)),
    },
    **LINEARS,
    "qk_norm_rope": {
        "decode": lambda: _rope(1, 1, 16, 8, 128),
        "prefill": lambda: _rope(2, 5, 4, 2, 64),
        "tables of each row": lambda: _rope(3, 4, 4, 2, 32, tables=3),
        "head_dim 72": lambda: _rope(2, 3, 4, 4, 72),
        "head_dim 2": lambda: _rope(1, 3, 4, 1, 2),
        "head_dim 256": lambda: _rope(1, 2, 2, 1, 256),
    },
    "attention": {
        **{
            f"groups {h}/{g}": partial(_attention, (2, h, g, 3, 19, 32))
            for h, g in ((16, 8), (32, 8), (40, 8), (64, 8), (32, 4), (64, 4), (4, 4), (6, 1))
        },
        **{f"head_dim {d}": partial(_attention, (1, 4, 2, 5, 40, d)) for d in (16, 32, 64, 72, 96, 128, 192, 256)},
        "causal": lambda: _attention((2, 8, 2, 33, 33, 64), causal=True),
        "causal decode": lambda: _attention((3, 8, 4, 1, 50, 64)),
        "positions": lambda: _attention((2, 8, 2, 4, 64, 32), positions=torch.tensor([9, 10, 11, 12])),
        "positions decode": lambda: _attention((2, 8, 2, 1, 300, 32), positions=torch.tensor([200])),
        "positions out of order": lambda: _attention((1, 4, 2, 4, 16, 32), positions=torch.tensor([9, 0, 15, 3])),
        "positions past the end": lambda: _attention((1, 4, 2, 2, 16, 32), positions=torch.tensor([15, 99])),
        "positions before the start": lambda: _attention((1, 4, 2, 2, 16, 32), positions=torch.tensor([-1, 0])),
        "left padding": lambda: _attention((4, 8, 2, 9, 9, 32), left_padding(4, 9, 9)),
        "left padding decode": lambda: _attention((4, 8, 2, 1, 21, 32), left_padding(4, 1, 21)),
        "mask of one row": lambda: _attention((2, 4, 2, 3, 8, 32), torch.rand(1, 1, 1, 8) > 0.4),
        "mask of each head": lambda: _attention((2, 4, 2, 3, 8, 32), torch.rand(2, 4, 3, 8) > 0.4),
        "all hidden": lambda: _attention((2, 4, 2, 3, 8, 32), torch.zeros(1, 1, 3, 8, dtype=torch.bool)),
        "additive": lambda: _attention((2, 4, 2, 3, 8, 32), torch.randn(2, 1, 3, 8)),
        "additive with -inf": lambda: _attention(
            (2, 4, 2, 3, 8, 32), torch.zeros(2, 1, 3, 8).masked_fill(torch.arange(8) > 5, -torch.inf)
        ),
        "mask and positions": lambda: _attention(
            (3, 4, 2, 2, 12, 32), torch.arange(12) >= torch.arange(3)[:, None, None, None], torch.tensor([6, 7])
        ),
        "mask and causal": lambda: _attention((2, 4, 2, 6, 6, 32), left_padding(2, 6, 6), causal=True),
        "long": lambda: _attention((1, 2, 1, 2, 1500, 64)),
        "long prefill": lambda: _attention((1, 2, 1, 150, 150, 32), causal=True),
        "no queries": lambda: _attention((2, 4, 2, 0, 5, 32)),
        "one key": lambda: _attention((2, 4, 2, 1, 1, 32)),
    },
    **PAGED,
    "moe_route": {
        "decode": lambda: (torch.randn(1, 128), 8, True),
        "prefill": lambda: (torch.randn(23, 128), 8, True),
        "not normalised": lambda: (torch.randn(5, 16), 4, False),
        "odd": lambda: (torch.randn(5, 13), 3, True),
        "all experts": lambda: (torch.randn(3, 8), 8, True),
        "top 1": lambda: (torch.randn(3, 8), 1, True),
        "one expert": lambda: (torch.randn(3, 1), 1, True),
        "no tokens": lambda: (torch.randn(0, 8), 2, True),
        "steep": lambda: (60 * torch.randn(4, 32), 4, True),
    },
    "moe_experts": {
        "decode": lambda: _experts(1, 16, 4, 64, 48),
        "prefill": lambda: _experts(19, 16, 4, 64, 48),
        "many tokens": lambda: _experts(70, 4, 2, 32, 24),
        "odd": lambda: _experts(5, 7, 3, 37, 11),
        "experts with no tokens": lambda: _experts(5, 16, 3, 32, 16, highest=3),
        "ids of another rank": _sentinel,
        "top 1": lambda: _experts(5, 8, 1, 32, 16),
        "all experts": lambda: _experts(5, 4, 4, 32, 16),
        "no tokens": lambda: _experts(0, 8, 2, 32, 16),
        "one expert twice": lambda: (
            *_experts(2, 4, 2, 32, 16)[:1],
            torch.tensor([[1, 1], [3, 3]]),
            torch.rand(2, 2),
            *_experts(2, 4, 2, 32, 16)[3:],
        ),
    },
    "top_tokens": {
        "decode": lambda: (torch.randn(1, 40000), 1),
        "prefill": lambda: (torch.randn(5, 517), 20),
        "odd": lambda: (torch.randn(3, 37), 7),
        "all of them": lambda: (torch.randn(2, 40), 40),
        "one token": lambda: (torch.randn(3, 1), 1),
        "equal ones": lambda: (_repeating(4, 3000), 64),
        "all equal": lambda: (torch.zeros(2, 500), 5),
        "hidden ones": lambda: (_partly_hidden(2, 300), 120),
        "past the kernel": lambda: (torch.randn(2, 1500), 1100),
        "no rows": lambda: (torch.randn(0, 40), 2),
    },
    "logit_signals": {
        "decode": lambda: (torch.randn(1, 40000), 39999, True),
        "prefill": lambda: (4 * torch.randn(5, 517), 0, True),
        "margin alone": lambda: (torch.randn(3, 5000), 17, False),
        "odd": lambda: (torch.randn(3, 37), 7, True),
        "steep": lambda: (60 * torch.randn(4, 4097), 2, True),
        "all equal": lambda: (torch.zeros(2, 9000), 0, True),
        "hidden ones": lambda: (_partly_hidden(2, 9000), 3, True),
        "one token": lambda: (torch.randn(3, 1), 0, True),
        "no rows": lambda: (torch.randn(0, 40), 2, True),
    },
}
CASES = [Case(op, name, make) for op, makers in _MAKERS.items() for name, make in makers.items()]


def cases(op: str) -> list[Case]:
    """All cases of one op."""
    return [c for c in CASES if c.op == op]


def case(op: str, name: str) -> Case:
    """One case by name."""
    return next(c for c in CASES if (c.op, c.name) == (op, name))
