"""moe_route and moe_experts: raised in both spellings of transformers, left alone where one detail differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.testing.capture import Captured, capture

TOKENS, HIDDEN, INTER, EXPERTS, TOP_K = 6, 16, 8, 8, 3


def route(
    logits: Tensor, *, softmax: torch.dtype = torch.float32, norm: bool = True, **topk: Any
) -> tuple[Tensor, Tensor]:
    probs = F.softmax(logits, dtype=softmax, dim=-1)
    weights, indices = torch.topk(probs, TOP_K, dim=-1, **topk)
    if norm:
        weights /= weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype), indices


def check(fn: Callable[..., Any], args: tuple[Tensor, ...], counts: dict[str, int], rtol: float = 0.0) -> Captured:
    wanted = fn(*args)
    captured = capture(fn, *args)
    torch.testing.assert_close(captured.result, wanted, rtol=rtol, atol=rtol)
    assert captured.counts == counts, captured.reasons
    return captured


def logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor]:
    return (torch.randn(TOKENS, EXPERTS).to(dtype),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_router_is_raised_once(dtype: torch.dtype, norm: bool) -> None:
    captured = check(lambda x: route(x, norm=norm), logits(dtype), {"moe_route": 1})
    assert captured.call("moe_route")[1:] == (TOP_K, norm)


def out_of_place(x: Tensor) -> tuple[Tensor, Tensor]:
    weights, indices = torch.topk(torch.softmax(x.float(), -1), TOP_K)
    return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), indices


def test_router_with_a_division_out_of_place_is_raised() -> None:
    check(out_of_place, logits(), {"moe_route": 1})


def test_unsorted_topk_is_left_alone() -> None:
    check(lambda x: route(x, sorted=False), logits(), {})


def test_smallest_topk_is_left_alone() -> None:
    check(lambda x: route(x, largest=False), logits(), {})


def test_softmax_in_bfloat16_is_left_alone() -> None:
    check(lambda x: route(x, softmax=torch.bfloat16), logits(torch.bfloat16), {})


def test_probabilities_rounded_before_topk_are_left_alone() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = torch.topk(F.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype), TOP_K, dim=-1)
        return weights / weights.sum(-1, keepdim=True), indices

    check(fn, (torch.randn(64, EXPERTS).bfloat16(),), {})


def test_probabilities_rounded_before_topk_and_not_divided_are_left_alone() -> None:
    def fn(x: Tensor) -> Any:
        return tuple(torch.topk(F.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype), TOP_K, dim=-1))

    check(fn, ((torch.randn(64, EXPERTS) * 0.01).bfloat16(),), {})


def test_softmax_over_tokens_is_left_alone() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = torch.topk(F.softmax(x, dim=0), TOP_K, dim=-1)
        return weights / weights.sum(-1, keepdim=True), indices

    check(fn, logits(), {})


def test_topk_over_tokens_is_left_alone() -> None:
    check(lambda x: tuple(torch.topk(F.softmax(x, dim=-1, dtype=torch.float32), TOP_K, dim=0)), logits(), {})


def test_division_by_another_sum_is_left_alone_or_equal() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = torch.topk(F.softmax(x, dim=-1, dtype=torch.float32), TOP_K, dim=-1)
        return weights / (weights.sum(-1, keepdim=True) + 1e-2), indices

    wanted = fn(*(args := logits()))
    torch.testing.assert_close(capture(fn, *args).result, wanted, rtol=0, atol=0)


def test_division_with_a_rounding_mode_is_left_alone_or_equal() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = torch.topk(F.softmax(x, dim=-1, dtype=torch.float32), TOP_K, dim=-1)
        return torch.div(weights, weights.sum(-1, keepdim=True), rounding_mode="floor"), indices

    wanted = fn(*(args := logits()))
    torch.testing.assert_close(capture(fn, *args).result, wanted, rtol=0, atol=0)


def test_probabilities_used_elsewhere_are_left_alone() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        probs = F.softmax(x, dim=-1, dtype=torch.float32)
        return (*torch.topk(probs, TOP_K, dim=-1), probs)

    check(fn, logits(), {})


def test_undivided_weights_used_elsewhere_are_kept() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        weights, indices = torch.topk(F.softmax(x, dim=-1, dtype=torch.float32), TOP_K, dim=-1)
        return weights / weights.sum(-1, keepdim=True), indices, weights

    wanted = fn(*(args := logits()))
    torch.testing.assert_close(capture(fn, *args).result, wanted, rtol=0, atol=0)


def test_three_dimensional_logits_are_left_alone() -> None:
    check(lambda x: route(x), (torch.randn(2, TOKENS, EXPERTS),), {})


def experts_data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    indices = torch.rand(TOKENS, EXPERTS).argsort(-1)[:, :TOP_K]
    weights = torch.rand(TOKENS, TOP_K)
    gate_up, down = torch.randn(EXPERTS, 2 * INTER, HIDDEN) * 0.3, torch.randn(EXPERTS, HIDDEN, INTER) * 0.3
    x = torch.randn(TOKENS, HIDDEN)
    return x.to(dtype), indices, weights.to(dtype), gate_up.to(dtype), down.to(dtype)


def batched(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor] = F.silu
) -> Tensor:
    ids = indices.reshape(-1)
    rows = x.repeat_interleave(TOP_K, dim=0)
    gate, up = torch.bmm(gate_up[ids], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
    out = torch.bmm(down[ids], (act(gate) * up).unsqueeze(-1)).squeeze(-1)
    return (out * weights.reshape(-1).unsqueeze(-1)).view(-1, TOP_K, HIDDEN).sum(dim=1)


def filled(inverse: Tensor, perm: Tensor) -> None:
    inverse[perm] = torch.arange(perm.shape[0])


def grouped(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    fill: Callable[[Tensor, Tensor], None] = filled,
    sort: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.sort,
    rows_of: Callable[[Tensor], Tensor] = lambda perm: perm // TOP_K,
) -> Tensor:
    ordered, perm = sort(indices.reshape(-1))
    offsets = torch.cumsum(torch.histc(ordered.float(), bins=EXPERTS, min=0, max=EXPERTS - 1), dim=0, dtype=torch.int32)
    hidden = torch._grouped_mm(x[rows_of(perm)], gate_up.transpose(-2, -1), offs=offsets)
    gate, up = hidden.chunk(2, dim=-1)
    out = torch._grouped_mm(F.silu(gate) * up, down.transpose(-2, -1), offs=offsets)
    weighted = out * weights.reshape(-1)[perm].unsqueeze(-1)
    inverse = torch.empty_like(perm)
    fill(inverse, perm)
    return weighted[inverse].view(-1, TOP_K, HIDDEN).sum(dim=1)


def test_batched_experts_are_raised_once() -> None:
    check(batched, experts_data(), {"moe_experts": 1}, rtol=1e-5)


def test_grouped_experts_are_raised_once() -> None:
    check(grouped, experts_data(torch.bfloat16), {"moe_experts": 1}, rtol=2 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("act", [F.gelu, F.relu, torch.sigmoid], ids=lambda f: f.__name__)
def test_experts_with_another_gate_are_left_alone(act: Callable[[Tensor], Tensor]) -> None:
    check(lambda *a: batched(*a, act=act), experts_data(), {})


def filled_backwards(inverse: Tensor, perm: Tensor) -> None:
    inverse[perm] = torch.arange(perm.shape[0] - 1, -1, -1)


def filled_from_one(inverse: Tensor, perm: Tensor) -> None:
    inverse[perm] = (torch.arange(perm.shape[0]) + 1).clamp(max=perm.shape[0] - 1)


def filled_twice(inverse: Tensor, perm: Tensor) -> None:
    inverse[perm] = torch.arange(perm.shape[0])
    inverse[0] = 0


def filled_with_itself(inverse: Tensor, perm: Tensor) -> None:
    inverse.copy_(perm)


@pytest.mark.parametrize("fill", [filled_backwards, filled_from_one, filled_twice, filled_with_itself])
def test_inverse_permutation_filled_otherwise_is_left_alone(fill: Callable[[Tensor, Tensor], None]) -> None:
    captured = capture(lambda *a: grouped(*a, fill=fill), *(args := experts_data(torch.bfloat16)))
    torch.testing.assert_close(captured.result, grouped(*args, fill=fill), rtol=0, atol=0)
    assert captured.counts.get("moe_experts") is None


def test_rows_of_other_tokens_are_left_alone() -> None:
    x, *rest = experts_data(torch.bfloat16)
    captured = capture(lambda *a: grouped(*a, rows_of=lambda p: p // 2), torch.cat((x, x)), *rest)
    assert "moe_experts" not in captured.counts


def test_tokens_counted_for_fewer_experts_are_left_alone() -> None:
    x, indices, weights, gate_up, down = experts_data(torch.bfloat16)
    args = (x, indices % (EXPERTS - 1), weights, gate_up, down)

    def fn(*a: Tensor) -> Tensor:
        ordered, perm = torch.sort(a[1].reshape(-1))
        counts = torch.histc(ordered.float(), bins=EXPERTS - 1, min=0, max=EXPERTS - 2)
        offsets = torch.cumsum(F.pad(counts, (0, 1)), dim=0, dtype=torch.int32)
        hidden = torch._grouped_mm(a[0][perm // TOP_K], a[3].transpose(-2, -1), offs=offsets)
        gate, up = hidden.chunk(2, dim=-1)
        out = torch._grouped_mm(F.silu(gate) * up, a[4].transpose(-2, -1), offs=offsets)
        weighted = out * a[2].reshape(-1)[perm].unsqueeze(-1)
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.shape[0])
        return weighted[inverse].view(-1, TOP_K, HIDDEN).sum(dim=1)

    captured = capture(fn, *args)
    torch.testing.assert_close(captured.result, fn(*args), rtol=0, atol=0)
    assert "moe_experts" not in captured.counts


def test_descending_sort_is_left_alone() -> None:
    def backwards(ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sort(ids, descending=True)

    captured = capture(lambda *a: grouped(*a, sort=backwards), *experts_data(torch.bfloat16))
    assert "moe_experts" not in captured.counts


def test_gate_and_up_swapped_are_left_alone() -> None:
    def fn(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        ids, rows = indices.reshape(-1), x.repeat_interleave(TOP_K, dim=0)
        up, gate = torch.bmm(gate_up[ids], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        out = torch.bmm(down[ids], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (out * weights.reshape(-1).unsqueeze(-1)).view(-1, TOP_K, HIDDEN).sum(dim=1)

    wanted = fn(*(args := experts_data()))
    captured = capture(fn, *args)
    torch.testing.assert_close(captured.result, wanted, rtol=0, atol=0)
    assert "moe_experts" not in captured.counts


def test_experts_of_other_ids_for_down_are_left_alone() -> None:
    def fn(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        ids, rows = indices.reshape(-1), x.repeat_interleave(TOP_K, dim=0)
        gate, up = torch.bmm(gate_up[ids], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        out = torch.bmm(down[(ids + 1) % EXPERTS], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (out * weights.reshape(-1).unsqueeze(-1)).view(-1, TOP_K, HIDDEN).sum(dim=1)

    captured = capture(fn, *(args := experts_data()))
    torch.testing.assert_close(captured.result, fn(*args), rtol=0, atol=0)
    assert "moe_experts" not in captured.counts


def test_sum_over_hidden_is_left_alone() -> None:
    def fn(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        ids, rows = indices.reshape(-1), x.repeat_interleave(TOP_K, dim=0)
        gate, up = torch.bmm(gate_up[ids], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        out = torch.bmm(down[ids], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (out * weights.reshape(-1).unsqueeze(-1)).view(TOKENS, HIDDEN, TOP_K).sum(dim=1)

    captured = capture(fn, *(args := experts_data()))
    torch.testing.assert_close(captured.result, fn(*args), rtol=0, atol=0)
    assert "moe_experts" not in captured.counts


def test_expert_rows_used_elsewhere_are_left_alone() -> None:
    def fn(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        ids, rows = indices.reshape(-1), x.repeat_interleave(TOP_K, dim=0)
        gate, up = torch.bmm(gate_up[ids], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        out = torch.bmm(down[ids], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (out * weights.reshape(-1).unsqueeze(-1)).view(-1, TOP_K, HIDDEN).sum(dim=1), out

    captured = capture(fn, *(args := experts_data()))
    torch.testing.assert_close(captured.result, fn(*args), rtol=0, atol=0)
    assert "moe_experts" not in captured.counts
