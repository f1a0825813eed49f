"""Products of one column by one row become elementwise ones; all others stay matrix products."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwenopt.lowering.direct import heavy_leftovers
from qwenopt.testing.capture import Captured, capture
from qwenopt.testing.models import tiny_model

SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "operator": operator.matmul,
    "function": torch.matmul,
    "method": lambda x, y: x.matmul(y),
    "bmm": torch.bmm,
}


def left(captured: Captured) -> list[str]:
    """The heavy nodes that are left in the graph."""
    (ctx,) = captured.contexts
    return heavy_leftovers(ctx.gm, ctx.raised)


def heavy(fn: Callable[..., Any], *args: Tensor, dynamic: bool | None = None) -> list[str]:
    """The heavy nodes that are left; the result must have eager's bits: one product each, and nothing to sum."""
    captured = capture(fn, *args, dynamic=dynamic)
    torch.testing.assert_close(captured.result, fn(*args), rtol=0, atol=0)
    return left(captured)


@pytest.mark.parametrize("how", SPELLINGS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_one_column_by_one_row(how: str, dynamic: bool) -> None:
    assert heavy(SPELLINGS[how], torch.randn(2, 5, 1), torch.randn(2, 1, 7), dynamic=dynamic) == []


@pytest.mark.parametrize("shapes", [((5, 1), (3, 1, 7)), ((4, 1, 5, 1), (3, 1, 7)), ((1, 1), (1, 1))], ids=str)
def test_batches_are_broadcast(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    assert heavy(operator.matmul, *(torch.randn(shape) for shape in shapes)) == []


def test_the_angles_of_the_rotary_embedding() -> None:
    """As transformers computes them up to 5.18, positions of several rows included."""

    def fn(frequencies: Tensor, positions: Tensor) -> Tensor:
        expanded = frequencies[None, :, None].float().expand(positions.shape[0], -1, 1)
        angles = (expanded @ positions[:, None, :].float()).transpose(1, 2)
        return torch.cat((angles, angles), dim=-1).cos()

    assert heavy(fn, torch.rand(8), torch.arange(14).view(2, 7)) == []


@pytest.mark.parametrize(
    "shapes", [((2, 5, 2), (2, 2, 7)), ((3, 2), (2, 4)), ((1,), (1, 7)), ((5, 1), (1,)), ((1,), (1,))], ids=str
)
def test_others_stay(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    assert len(heavy(operator.matmul, *(torch.randn(shape) for shape in shapes))) == 1


def test_a_product_written_elsewhere_stays() -> None:
    def fn(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
        torch.matmul(x, y, out=out)
        return out

    assert len(heavy(fn, torch.randn(2, 5, 1), torch.randn(2, 1, 7), torch.empty(2, 5, 7))) == 1


class Outer(nn.Module):
    """A rotary embedding in the older spelling, in the place of a model's own."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.inv_freq, self.scaling = own.inv_freq, own.attention_scaling

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, D] of position_ids [B, T]."""
        expanded = self.inv_freq[None, :, None].float().expand(position_ids.shape[0], -1, 1).to(x.device)
        angles = (expanded.float() @ position_ids[:, None, :].float()).transpose(1, 2)
        emb = torch.cat((angles, angles), dim=-1)
        return (emb.cos() * self.scaling).to(x.dtype), (emb.sin() * self.scaling).to(x.dtype)


@pytest.mark.parametrize("name", ["0.6B", "30B-A3B"])
def test_a_model_with_the_older_spelling_leaves_nothing_heavy(name: str) -> None:
    model = tiny_model(name)
    model.model.rotary_emb = Outer(model.model.rotary_emb)  # type: ignore[union-attr, arg-type, assignment]
    assert left(capture(lambda ids: model(ids, use_cache=False).logits, torch.arange(7)[None])) == []
