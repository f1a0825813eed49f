"""qk_norm_rope: raised in Qwen3's form, left alone in every form that only looks like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qwenopt.testing.capture import capture

EPS = 1e-6


def norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotate: Callable[[Tensor], Tensor] = rotate_half
) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def heads(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    return norm(x, weight, eps).transpose(1, 2)


def data(dtype: torch.dtype = torch.float32, batch: int = 2, dim: int = 16) -> tuple[Tensor, ...]:
    q, k = torch.randn(batch, 5, 4, dim), torch.randn(batch, 5, 2, dim)
    weights = 1 + 0.2 * torch.randn(2, dim)
    angle = torch.rand(1, 5, dim // 2).repeat(1, 1, 2)
    return tuple(t.to(dtype) for t in (q, k, *weights, angle.cos(), angle.sin()))


def check(fn: Callable[..., tuple[Tensor, ...]], args: tuple[Tensor, ...], counts: dict[str, int]) -> list[str]:
    wanted = fn(*args)
    captured = capture(fn, *args)
    torch.testing.assert_close(captured.result, wanted, rtol=0, atol=0)
    assert captured.counts == counts, captured.reasons
    return captured.reasons


def qwen3(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope(heads(q, qw), heads(k, kw), cos, sin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_queries_and_keys_are_raised_together(dtype: torch.dtype, batch: int) -> None:
    check(qwen3, data(dtype, batch), {"qk_norm_rope": 1})


def test_two_layers_on_one_table_are_paired_each_with_its_own() -> None:
    def fn(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        results = []
        for weight in (qw, kw):
            for x in (heads(q, weight), heads(k, weight)):
                results.append(x * cos + rotate_half(x) * sin)
        return tuple(results)

    check(fn, data(), {"qk_norm_rope": 2})


def interleaved(x: Tensor) -> Tensor:  # GPT-J's pairs (0, 1), (2, 3), ...
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def other_sign(x: Tensor) -> Tensor:
    return torch.cat((x[..., x.shape[-1] // 2 :], -x[..., : x.shape[-1] // 2]), dim=-1)


def other_halves(x: Tensor) -> Tensor:
    return torch.cat((-x[..., 1::2], x[..., ::2]), dim=-1)


def other_split(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 4 :], x[..., : x.shape[-1] // 4]), dim=-1)


def same_half_twice(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., x.shape[-1] // 2 :]), dim=-1)


@pytest.mark.parametrize("rotate", [interleaved, other_sign, other_halves, other_split, same_half_twice])
def test_other_rotations_leave_only_the_norms(rotate: Callable[[Tensor], Tensor]) -> None:
    def fn(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rope(heads(q, qw), heads(k, kw), cos, sin, rotate)

    check(fn, data(), {"rms_norm": 2})


def test_different_eps_leaves_only_the_norms() -> None:
    def fn(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rope(heads(q, qw, 1e-6), heads(k, kw, 1e-5), cos, sin)

    reasons = check(fn, data(), {"rms_norm": 2})
    assert any("1e-06" in r and "1e-05" in r for r in reasons)


def test_difference_instead_of_sum_is_left_alone() -> None:
    def fn(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k, cos, sin = heads(q, qw), heads(k, kw), cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos - rotate_half(q) * sin, k * cos - rotate_half(k) * sin

    check(fn, data(), {"rms_norm": 2})


def test_rotation_without_norms_is_left_alone() -> None:
    def fn(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    check(fn, data(), {})


def test_rotation_of_another_tensor_than_the_scaled_one_is_left_alone() -> None:
    def fn(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin, a, b = cos.unsqueeze(1), sin.unsqueeze(1), heads(q, qw), heads(q, kw)
        return a * cos + rotate_half(b) * sin, heads(k, kw)

    check(fn, data(), {"rms_norm": 3})


def test_queries_alone_are_left_alone() -> None:
    def fn(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = heads(q, qw)
        return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1), k

    check(fn, data(), {"rms_norm": 1})


def test_swapped_tables_of_the_keys_are_not_paired() -> None:
    def fn(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k, cos, sin = heads(q, qw), heads(k, kw), cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + rotate_half(q) * sin, k * sin + rotate_half(k) * cos

    check(fn, data(), {"rms_norm": 2})


def test_normed_keys_used_elsewhere_are_left_alone() -> None:
    def fn(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        q, k = heads(q, qw), heads(k, kw)
        return (*rope(q, k, cos, sin), k)

    check(fn, data(), {"rms_norm": 2})


def test_tables_written_between_queries_and_keys_are_seen() -> None:
    def fn(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k, cos = heads(q, qw), heads(k, kw), cos.clone()
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        first = q * c + rotate_half(q) * s
        cos.mul_(2)
        return first, k * c + rotate_half(k) * s

    check(fn, data(), {"rms_norm": 2})


def test_tables_of_one_position_are_broadcast() -> None:
    q, k, qw, kw, cos, sin = data()
    captured = capture(qwen3, q, k, qw, kw, cos[:, :1], sin[:, :1])
    torch.testing.assert_close(captured.result, qwen3(q, k, qw, kw, cos[:, :1], sin[:, :1]), rtol=0, atol=0)


def test_keys_made_after_the_rotated_queries_are_used_are_left_alone() -> None:
    def fn(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        q = heads(q, qw)
        first = q * c + rotate_half(q) * s
        k = heads(k + first.mean(), kw)
        return first, k * c + rotate_half(k) * s

    check(fn, data(), {"rms_norm": 2})


def test_half_rotated_heads_are_left_alone() -> None:
    def fn(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = heads(q, qw), heads(k, kw)
        a, b = rope(q[..., :8], k[..., :8], cos[..., :8], sin[..., :8])
        return torch.cat((a, q[..., 8:]), -1), torch.cat((b, k[..., 8:]), -1)

    check(fn, data(), {"rms_norm": 2})
