"""Writes between a read and its use: Dynamo's graph is not functional, so nothing may be moved past them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.testing.capture import capture


def scale(x: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def check(fn: Callable[..., Any], *args: Tensor, counts: dict[str, int] | None = None) -> list[str]:
    """Equal to eager in results and in what is written to the arguments; raised so often, where that is said."""
    again = tuple(a.clone() for a in args)
    wanted = fn(*again)
    captured = capture(fn, *args)
    torch.testing.assert_close(captured.result, wanted, rtol=0, atol=0)
    torch.testing.assert_close(args, again, rtol=0, atol=0)
    if counts is not None:
        assert captured.counts == counts, captured.reasons
    return captured.reasons


# Ways to overwrite x that Dynamo leaves in the graph as they are.
WRITES: dict[str, Callable[[Tensor], Any]] = {
    "method": lambda x: x.add_(1),
    "operator": lambda x: x.__iadd__(1),
    "setitem": lambda x: x.__setitem__((slice(None), slice(0, 4)), 0.0),
    "view": lambda x: x.view(-1).mul_(2),
    "slice": lambda x: x[:, 1:].zero_(),
    "out": lambda x: torch.neg(x, out=x),
    "out tuple": lambda x: torch.max(x.clone(), 0, out=(x[0], torch.empty(32, dtype=torch.int64))),
    "inplace keyword": lambda x: F.relu(x, inplace=True),
    "inplace positional": lambda x: F.relu(x, True),
    "inplace third": lambda x: F.elu(x, 1.0, True),
    "function": lambda x: torch.relu_(x),
    "functional": lambda x: F.relu_(x),
    "foreach": lambda x: torch._foreach_add_([x], 1.0),
    "operator in a list": lambda x: torch._foreach_mul_((x, torch.ones(3)), 2.0),
    "overload": lambda x: torch.ops.aten.add_.Scalar(x, 1),
    "packet": lambda x: torch.ops.aten.mul_(x, 2),
    "index": lambda x: x.index_copy_(0, torch.tensor([0]), torch.ones(1, 32)),
    "alias": lambda x: x.detach().add_(1),
    "transposed": lambda x: x.t().add_(1),
}


@pytest.mark.parametrize("how", WRITES)
def test_write_inside_a_norm_is_seen(how: str) -> None:
    def fn(x: Tensor, weight: Tensor) -> Tensor:
        x = x * 1
        factor = scale(x)
        WRITES[how](x)
        return weight * (x * factor)

    check(fn, torch.randn(4, 32), torch.rand(32), counts={})


@pytest.mark.parametrize("how", WRITES)
def test_write_between_sum_and_norm_is_seen(how: str) -> None:
    def fn(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        WRITES[how](total)
        return weight * (total * scale(total)), total

    check(fn, torch.randn(4, 32), torch.randn(4, 32), torch.rand(32), counts={"rms_norm": 1})


@pytest.mark.parametrize("how", WRITES)
def test_write_between_silu_and_product_is_seen(how: str) -> None:
    def fn(gate: Tensor, up: Tensor) -> Tensor:
        gate = gate * 1
        gated = F.silu(gate)
        WRITES[how](gate)
        return gated * up + gate

    check(fn, torch.randn(4, 32), torch.randn(4, 32), counts={})


def test_write_to_the_residual_after_the_norm_was_read_is_seen() -> None:
    def fn(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        normed = weight * (total * scale(total))
        residual.add_(1)
        return normed + residual, total

    check(fn, torch.randn(4, 32), torch.randn(4, 32), torch.rand(32), counts={"add_rms_norm": 1})


def test_write_to_the_residual_between_sum_and_norm_keeps_them_apart() -> None:
    def fn(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        total = residual + x
        residual.add_(1)
        return weight * (total * scale(total)) + residual

    check(fn, torch.randn(4, 32), torch.randn(4, 32), torch.rand(32))


def test_copy_of_a_reduced_result_into_a_linear_keeps_its_place() -> None:
    def fn(x: Tensor, w: Tensor, other: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        out = F.linear(x, w)
        out.copy_(out + other)  # as tensor parallelism writes back its all_reduce
        total = residual + out
        return weight * (total * scale(total)), total

    args = (torch.randn(4, 16), torch.randn(32, 16), torch.randn(4, 32), torch.randn(4, 32), torch.rand(32))
    check(fn, *args, counts={"linear": 1, "add_rms_norm": 1})


def test_write_to_a_weight_between_two_uses_is_seen() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        first = F.linear(x, w)
        w.mul_(2)
        return first + F.linear(x, w)

    check(fn, torch.randn(4, 16), torch.randn(16, 16), counts={"linear": 2})


def test_write_to_the_sum_after_the_norm_is_seen() -> None:
    def fn(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        normed = weight * (total * scale(total))
        total.mul_(3)
        return normed, total

    check(fn, torch.randn(4, 32), torch.randn(4, 32), torch.rand(32), counts={"add_rms_norm": 1})


def test_inplace_silu_is_left_alone() -> None:
    def fn(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        gate = gate * 1
        return F.silu(gate, inplace=True) * up, gate

    check(fn, torch.randn(4, 32), torch.randn(4, 32), counts={})


def test_silu_used_elsewhere_is_left_alone() -> None:
    def fn(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        gated = F.silu(gate)
        return gated * up, gated

    check(fn, torch.randn(4, 32), torch.randn(4, 32), counts={})


@pytest.mark.parametrize("gate", [F.gelu, torch.sigmoid, F.relu, F.mish], ids=lambda f: f.__name__)
def test_other_gates_are_left_alone(gate: Callable[[Tensor], Tensor]) -> None:
    check(lambda x, up: gate(x) * up, torch.randn(4, 32), torch.randn(4, 32), counts={})


def test_gate_is_raised_once() -> None:
    check(lambda x, up: F.silu(x) * up, torch.randn(4, 32), torch.randn(4, 32), counts={"silu_mul": 1})


def test_gate_that_broadcasts_is_left_alone() -> None:
    check(lambda x, up: F.silu(x) * up, torch.randn(4, 32), torch.randn(1, 32), counts={})


def test_gate_that_changes_the_dtype_is_left_alone() -> None:
    check(lambda x, up: F.silu(x) * up, torch.randn(4, 32).bfloat16(), torch.randn(4, 32))
