"""Products merged on a GPU: exactly those that belong together, nothing that is near."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops import TOP_TOKENS
from qwenopt.ops.op import call
from qwenopt.testing.fake_cuda import FakeGpu
from qwenopt.testing.merged import raised_and_merged, tensors


def test_what_is_like_a_gated_product_and_is_not_one(gpu: FakeGpu) -> None:
    x, other, a, b, bias = tensors(gpu, (2, 16), (2, 16), (8, 16), (8, 16), (8,))

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.silu(F.linear(x, a)) * F.linear(x, b)

    def of_two(x: Tensor, other: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.silu(F.linear(x, a)) * F.linear(other, b)

    def with_bias(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.linear(x, a, bias)) * F.linear(x, b)

    def used_elsewhere(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        up = F.linear(x, b)
        return F.silu(F.linear(x, a)) * up, up

    def of_itself(x: Tensor, a: Tensor) -> Tensor:
        gate = F.linear(x, a)
        return F.silu(gate) * gate

    def written_between(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        gate = F.linear(x, a)
        x.mul_(2)
        return F.silu(gate) * F.linear(x, b)

    assert raised_and_merged(gpu, plain, x, a, b) == {"linear_silu_mul": 1}
    assert raised_and_merged(gpu, of_two, x, other, a, b) == {"silu_mul": 1, "linear": 2}
    assert raised_and_merged(gpu, with_bias, x, a, b, bias) == {"silu_mul": 1, "linear": 2}
    assert raised_and_merged(gpu, of_itself, x, a) == {"silu_mul": 1, "linear": 1}
    assert raised_and_merged(gpu, written_between, x, a, b) == {"silu_mul": 1, "linear": 2}
    # Two products of one x they still are.
    assert raised_and_merged(gpu, used_elsewhere, x, a, b) == {"silu_mul": 1, "linear_group": 1}


def test_what_is_like_a_group_and_is_not_one(gpu: FakeGpu) -> None:
    x, a, b, c, d, bias, square = tensors(gpu, (2, 16), (8, 16), (4, 16), (4, 16), (4, 16), (4,), (16, 16))

    def three(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, a), F.linear(x, b).sin(), F.linear(x, c)

    def four(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, a), F.linear(x, b), F.linear(x, c), F.linear(x, d)

    def one_with_bias(x: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, a), F.linear(x, b), F.linear(x, c, bias)

    def weight_made_later(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        first = F.linear(x, a)
        return F.linear(x, b * first.sum())

    def written_between(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        first = F.linear(x, a)
        x.mul_(2)
        return first, F.linear(x, b)

    def weight_written_between(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        first = F.linear(x, a)
        b.mul_(2)
        return first, F.linear(x, b)

    def in_a_row(x: Tensor, a: Tensor, square: Tensor) -> Tensor:
        return F.linear(F.linear(x, square), a)

    assert raised_and_merged(gpu, three, x, a, b, c) == {"linear_group": 1}
    assert raised_and_merged(gpu, four, x, a, b, c, d) == {"linear": 4}, "the kernel has up to three"
    assert raised_and_merged(gpu, one_with_bias, x, a, b, c, bias) == {"linear": 1, "linear_group": 1}
    assert raised_and_merged(gpu, weight_made_later, x, a, b) == {"linear": 2}
    assert raised_and_merged(gpu, written_between, x, a, b) == {"linear": 2}
    assert raised_and_merged(gpu, weight_written_between, x, a, b) == {"linear": 2}
    assert raised_and_merged(gpu, in_a_row, x, a, square) == {"linear": 2}


def test_what_is_like_a_product_before_a_norm_and_is_not_one(gpu: FakeGpu) -> None:
    x, a, bias, residual, weight = tensors(gpu, (2, 16), (8, 16), (8,), (2, 8), (8,))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * wide.to(x.dtype)

    def plain(x: Tensor, a: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + F.linear(x, a)
        return norm(total, weight), total

    def sum_alone(x: Tensor, a: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return norm(residual + F.linear(x, a), weight)

    def with_bias(x: Tensor, a: Tensor, bias: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return norm(residual + F.linear(x, a, bias), weight)

    def used_elsewhere(x: Tensor, a: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        product = F.linear(x, a)
        return norm(residual + product, weight), product

    def the_residual(x: Tensor, a: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return norm(F.linear(x, a) + residual, weight)

    def written_between(x: Tensor, a: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        product = F.linear(x, a)
        a.mul_(2)
        return norm(residual + product, weight)

    args = (x, a, residual, weight)
    assert raised_and_merged(gpu, plain, *args) == {"linear_add_rms_norm": 1}
    assert raised_and_merged(gpu, sum_alone, *args) == {"linear_add_rms_norm": 1}
    apart = {"add_rms_norm": 1, "linear": 1}
    assert raised_and_merged(gpu, with_bias, x, a, bias, residual, weight) == apart
    assert raised_and_merged(gpu, used_elsewhere, *args) == apart
    assert raised_and_merged(gpu, the_residual, *args) == apart
    assert raised_and_merged(gpu, written_between, *args) == apart


def test_what_is_like_a_choice_of_the_likeliest_and_is_not_one(gpu: FakeGpu) -> None:
    x, weight, bias = tensors(gpu, (1, 3, 16), (8, 16), (8,))

    def choose(logits: Tensor, k: int = 1) -> Tensor:
        ids: Tensor = call(TOP_TOKENS, logits, k)[1]
        return ids.squeeze(1)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return choose(F.linear(x, weight)[0])

    def rows_alone(x: Tensor, weight: Tensor) -> Tensor:
        return choose(F.linear(x[0], weight))

    def with_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return choose(F.linear(x, weight, bias)[0])

    def of_several(x: Tensor, weight: Tensor) -> Tensor:
        return choose(F.linear(x, weight)[0], 2)

    def with_values(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = call(TOP_TOKENS, F.linear(x, weight)[0], 1)
        return values, ids

    def logits_used(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, weight)[0]
        return choose(logits), logits

    def all_logits_used(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, weight)
        return choose(logits[0]), logits

    def one_of_two(x: Tensor, weight: Tensor) -> Tensor:
        return choose(F.linear(x.expand(2, 3, 16), weight)[0])

    def masked(x: Tensor, weight: Tensor) -> Tensor:
        return choose(F.linear(x, weight)[0] + 1)

    def written_between(x: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(x, weight)[0]
        weight.mul_(2)
        return choose(logits)

    def logits_written(x: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(x, weight)[0]
        logits[:, 3] = -1
        return choose(logits)

    assert raised_and_merged(gpu, plain, x, weight) == {"linear_argmax": 1}
    assert raised_and_merged(gpu, rows_alone, x, weight) == {"linear_argmax": 1}
    assert raised_and_merged(gpu, with_bias, x, weight, bias) == {"linear_argmax": 1}
    apart = {"top_tokens": 1, "linear": 1}
    for near in (of_several, with_values, logits_used, all_logits_used, one_of_two, masked):
        assert raised_and_merged(gpu, near, x, weight) == apart, near.__name__
    assert raised_and_merged(gpu, written_between, x, weight) == apart
    assert raised_and_merged(gpu, logits_written, x, weight) == apart
