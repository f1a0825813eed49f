"""rms_norm and add_rms_norm: raised where they are, left alone where something looks like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwenopt.testing.capture import capture

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, residual, weight = torch.randn(2, 3, 32), torch.randn(2, 3, 32), 1 + 0.2 * torch.randn(32)
    return x.to(dtype), residual.to(dtype), weight.to(dtype)


def norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def check(fn: Callable[..., Any], args: tuple[Tensor, ...], counts: dict[str, int]) -> list[str]:
    """Raised exactly so often, equal to eager, arguments left in the same state."""
    again = tuple(a.clone() for a in args)
    wanted = fn(*again)
    captured = capture(fn, *args)
    torch.testing.assert_close(captured.result, wanted, rtol=0, atol=0)
    torch.testing.assert_close(args, again, rtol=0, atol=0)
    assert captured.counts == counts
    return captured.reasons


@DTYPES
def test_norm_is_raised_once(dtype: torch.dtype) -> None:
    x, _, weight = data(dtype)
    check(norm, (x, weight), {"rms_norm": 1})


@DTYPES
@pytest.mark.parametrize("swapped", [False, True])
def test_sum_before_a_norm_is_taken_in(dtype: torch.dtype, swapped: bool) -> None:
    def fn(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual if swapped else residual + x
        return norm(total, weight), total

    check(fn, data(dtype), {"add_rms_norm": 1})


def test_other_spellings_of_a_norm_are_raised() -> None:
    def fn(x: Tensor, weight: Tensor) -> Tensor:
        h = x.float()
        variance = torch.mean(torch.square(h), -1, True)
        return (torch.rsqrt(torch.add(variance, 1e-6)) * h).type(x.dtype) * weight

    x, _, weight = data(torch.bfloat16)
    check(fn, (x, weight), {"rms_norm": 1})


def test_norm_without_the_cast_to_float32_is_left_alone() -> None:
    def fn(x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    x, _, weight = data(torch.bfloat16)
    reasons = check(fn, (x, weight), {})
    assert any("computed in torch.bfloat16" in r for r in reasons)


def test_layer_norm_is_left_alone() -> None:
    def fn(x: Tensor, weight: Tensor) -> Tensor:
        h = x - x.mean(-1, keepdim=True)
        return weight * (x * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))

    x, _, weight = data()
    check(fn, (x, weight), {})


@pytest.mark.parametrize("name", ["sum", "wrong dim", "cube"])
def test_other_statistics_are_left_alone(name: str) -> None:
    statistic = {
        "sum": lambda h: h.pow(2).sum(-1, keepdim=True),
        "wrong dim": lambda h: h.pow(2).mean(-2, keepdim=True),
        "cube": lambda h: h.pow(3).mean(-1, keepdim=True),
    }[name]
    x, _, weight = data()
    check(lambda x, w: w * (x * torch.rsqrt(statistic(x).abs() + 1e-6)), (x, weight), {})


def test_norm_whose_scale_is_used_elsewhere_is_left_alone() -> None:
    def fn(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * (x * scale), scale

    x, _, weight = data()
    reasons = check(fn, (x, weight), {})
    assert any("also used by" in r for r in reasons)


def test_norm_whose_float32_copy_is_used_elsewhere_is_left_alone() -> None:
    def fn(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = x.float()
        return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype), h

    x, _, weight = data(torch.bfloat16)
    check(fn, (x, weight), {})


@DTYPES
def test_norm_scaled_by_one_plus_weight_gives_the_same(dtype: torch.dtype) -> None:
    def fn(x: Tensor, weight: Tensor) -> Tensor:  # Gemma: the product is made in float32, then cast
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (h * (1.0 + weight.float())).type_as(x)

    x, _, weight = data(dtype)
    wanted = fn(x, weight)
    assert torch.equal(capture(fn, x, weight).result, wanted)


def test_norm_with_float32_weight_on_bfloat16_is_left_alone() -> None:
    def fn(x: Tensor, weight: Tensor) -> Tensor:  # the normed values are never rounded to bfloat16
        h = x.float()
        return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))

    x, _, weight = data(torch.bfloat16)
    check(fn, (x, weight.float()), {})


def test_norm_with_another_cast_on_the_way_is_left_alone() -> None:
    def fn(x: Tensor, weight: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * h.to(torch.float16).to(torch.bfloat16)

    x, _, weight = data(torch.bfloat16)
    check(fn, (x * 100, weight), {})


def test_norm_of_integers_is_left_alone() -> None:
    def fn(x: Tensor, weight: Tensor) -> Tensor:
        h = x.float()
        return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))

    _, _, weight = data()
    check(fn, (torch.randint(-9, 9, (4, 32)), weight), {})


def test_sum_that_broadcasts_stays_outside_the_norm() -> None:
    def fn(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return norm(residual[:, :1] + x, weight)

    check(fn, data(), {"rms_norm": 1})


def test_sum_with_alpha_stays_outside_the_norm() -> None:
    def fn(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return norm(torch.add(residual, x, alpha=2), weight)

    check(fn, data(), {"rms_norm": 1})


def test_sum_into_a_given_tensor_is_still_written_there() -> None:
    def fn(x: Tensor, residual: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.add(residual, x, out=out)
        return norm(total, weight), out * 2

    args = (*data(), torch.zeros(2, 3, 32))
    again = tuple(a.clone() for a in args)
    wanted = fn(*again)
    captured = capture(fn, *args)
    torch.testing.assert_close(captured.result, wanted, rtol=0, atol=0)
    torch.testing.assert_close(args, again, rtol=0, atol=0)


def test_norms_of_two_sums_are_each_raised() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
            first = residual + x
            second = first + norm(first, weight)
            return norm(second, weight) + second

    check(Block(), data(), {"add_rms_norm": 2})
