"""attention: raised with what it is told, and with query positions only where the mask is proven to be causal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.testing.capture import Captured, capture

LENGTH, SEQ, GROUPS, HEADS, DIM = 12, 4, 2, 4, 16
Mask = Callable[[Tensor], Tensor]


def data(seq: int = SEQ, length: int = LENGTH, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, heads, seq, DIM), torch.randn(2, GROUPS, length, DIM), torch.randn(2, GROUPS, length, DIM)


def repeat(x: Tensor, times: int) -> Tensor:
    batch, groups, length, dim = x.shape
    return x[:, :, None, :, :].expand(batch, groups, times, length, dim).reshape(batch, groups * times, length, dim)


def attend(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    times = q.shape[1] // k.shape[1]
    out = F.scaled_dot_product_attention(q, repeat(k, times), repeat(v, times), scale=DIM**-0.5, **how)
    return out.transpose(1, 2).contiguous()


def check(fn: Callable[..., Tensor], *args: Tensor, raised: int = 1) -> Captured:
    wanted = fn(*[a.clone() for a in args])
    captured = capture(fn, *args)
    torch.testing.assert_close(captured.result, wanted, rtol=1e-6, atol=1e-6)
    assert captured.counts == ({"attention": raised} if raised else {}), captured.reasons
    return captured


def masked(make: Mask) -> Captured:
    """Attention with the mask that `make` builds from the query positions (which start at 3)."""

    def fn(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        return attend(q, k, v, attn_mask=make(positions))

    return check(fn, *data(), torch.arange(3, 3 + SEQ))


def keys() -> Tensor:
    return torch.arange(LENGTH)


def causal(positions: Tensor) -> Tensor:
    return keys()[None, None, None, :] <= positions[None, None, :, None]


PROVEN: dict[str, Mask] = {
    "le": causal,
    "ge": lambda p: p[None, None, :, None] >= keys()[None, None, None, :],
    "expanded": lambda p: causal(p).expand(2, -1, -1, -1),
    "and ones": lambda p: p.new_ones((), dtype=torch.bool) & causal(p),
    "plus zero": lambda p: (keys() + 0)[None, None, None, :] <= p[None, None, :, None],
    "two dimensions": lambda p: keys()[None, :] <= p[:, None],
}


@pytest.mark.parametrize("name", PROVEN)
def test_causal_mask_becomes_query_positions(name: str) -> None:
    mask, positions = masked(PROVEN[name]).call("attention")[3:5]
    assert mask is None
    assert positions is not None


def sliding(p: Tensor) -> Tensor:
    return causal(p) & (keys()[None, None, None, :] > p[None, None, :, None] - 3)


def prefix(p: Tensor) -> Tensor:
    return causal(p) | (keys() < 5)[None, None, None, :]


def padded(p: Tensor) -> Tensor:
    return causal(p) & (torch.arange(2)[:, None, None, None] <= keys()[None, None, None, :])


def written(write: Callable[[Tensor], Any]) -> Mask:
    def make(p: Tensor) -> Tensor:
        mask = causal(p)
        write(mask)
        return mask

    return make


def ones_written(p: Tensor) -> Tensor:
    ones = p.new_ones((1, 1, SEQ, LENGTH), dtype=torch.bool)
    ones[..., :2] = False
    return ones & causal(p)


def keys_written(p: Tensor) -> Tensor:
    k = keys()
    k.add_(1)
    return k[None, None, None, :] <= p[None, None, :, None]


def positions_written(p: Tensor) -> Tensor:
    p = p + 0
    mask = causal(p)
    p.add_(3)
    return mask


def anded_in_place(p: Tensor) -> Tensor:
    mask = causal(p)
    mask &= keys() > 0
    return mask


HONOURED: dict[str, Mask] = {
    "sliding window": sliding,
    "prefix": prefix,
    "padding": padded,
    "strictly before": lambda p: keys()[None, None, None, :] < p[None, None, :, None],
    "after": lambda p: keys()[None, None, None, :] >= p[None, None, :, None],
    "bidirectional": lambda p: p.new_ones((1, 1, SEQ, LENGTH), dtype=torch.bool),
    "keys from one": lambda p: torch.arange(1, LENGTH + 1)[None, None, None, :] <= p[None, None, :, None],
    "keys by two": lambda p: torch.arange(0, 2 * LENGTH, 2)[None, None, None, :] <= p[None, None, :, None],
    "keys plus one": lambda p: (keys() + 1)[None, None, None, :] <= p[None, None, :, None],
    "keys reversed": lambda p: keys().flip(0)[None, None, None, :] <= p[None, None, :, None],
    "float positions": lambda p: keys()[None, None, None, :] <= (p + 0.5)[None, None, :, None],
    "bool cast to float": lambda p: causal(p).to(torch.float32),
    "bfloat16 keys": lambda p: (
        torch.arange(LENGTH, dtype=torch.bfloat16)[None, None, None, :] <= p[None, None, :, None]
    ),
    "additive": lambda p: torch.zeros(1, 1, SEQ, LENGTH).masked_fill(~causal(p), -torch.inf),
    "written by item": written(lambda m: m.__setitem__((..., slice(0, 2)), False)),
    "written by method": written(lambda m: m.logical_and_(keys() > 0)),
    "written by masked_fill_": written(lambda m: m.masked_fill_(keys() == 1, False)),
    "written by function": written(lambda m: torch.logical_and(m, keys() > 0, out=m)),
    "written by operator": anded_in_place,
    "written through a view": written(lambda m: m[..., 1:].logical_and_(keys()[1:] > 2)),
    "written by iand on an alias": written(lambda m: m.view(-1).view(SEQ, LENGTH).__iand__(keys() > 0)),
    "ones written": ones_written,
    "keys written": keys_written,
    "positions written": positions_written,
}


@pytest.mark.parametrize("name", HONOURED)
def test_any_other_mask_is_honoured(name: str) -> None:
    mask, positions = masked(HONOURED[name]).call("attention")[3:5]
    assert mask is not None
    assert positions is None


def test_query_axis_of_another_length_is_honoured() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        return attend(q, k, v, attn_mask=keys()[None, None, None, :] <= positions[None, None, :, None])

    assert check(fn, *data(), torch.tensor([7])).call("attention")[4] is None  # one row for all four queries


def test_positions_of_each_row_are_honoured() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        return attend(q, k, v, attn_mask=keys()[None, None, None, :] <= positions[:, None, :, None])

    assert check(fn, *data(), torch.tensor([[3, 4, 5, 6], [6, 7, 8, 9]])).call("attention")[4] is None


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_without_a_mask_is_raised(is_causal: bool) -> None:
    captured = check(lambda q, k, v: attend(q, k, v, is_causal=is_causal), *data(SEQ, SEQ))
    assert captured.call("attention")[3:6] == (None, None, is_causal)


def test_repeated_heads_are_read_once() -> None:
    _, k, v = check(attend, *data()).call("attention")[:3]
    assert [n.op for n in (k, v)] == ["placeholder", "placeholder"]


def test_heads_repeated_in_another_order_are_not_read_once() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tiled = [x[:, None].expand(2, 2, GROUPS, LENGTH, DIM).reshape(2, 2 * GROUPS, LENGTH, DIM) for x in (k, v)]
        return F.scaled_dot_product_attention(q, *tiled).transpose(1, 2).contiguous()

    assert check(fn, *data()).call("attention")[1].op != "placeholder"


def test_repeated_keys_used_elsewhere_are_kept() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = repeat(k, 2), repeat(v, 2)
        return F.scaled_dot_product_attention(q, k, v), k

    wanted = fn(*(args := data()))
    torch.testing.assert_close(capture(fn, *args).result, wanted)


def test_repeated_keys_written_before_use_are_seen() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = repeat(k, 2), repeat(v, 2)
        k.add_(1)
        return F.scaled_dot_product_attention(q, k, v)

    wanted = fn(*(args := data()))
    torch.testing.assert_close(capture(fn, *args).result, wanted)


def test_keys_written_after_they_were_repeated_are_seen() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k * 1
        repeated = repeat(k, 2)
        k.zero_()
        return F.scaled_dot_product_attention(q, repeated, repeat(v, 2)) + k.sum()

    wanted = fn(*(args := data()))
    torch.testing.assert_close(capture(fn, *args).result, wanted)


def test_result_written_between_its_views_is_seen() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, repeat(k, 2), repeat(v, 2))
        turned = out.transpose(1, 2)
        out.mul_(2)
        return turned.contiguous()

    wanted = fn(*(args := data()))
    torch.testing.assert_close(capture(fn, *args).result, wanted)


@pytest.mark.parametrize("scale", [None, 1.0, 0.1])
def test_scale_is_kept(scale: float | None) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous()

    assert check(fn, *data()).call("attention")[6] == (scale or DIM**-0.5)


def test_dropout_is_left_alone() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, enable_gqa=True)

    captured = capture(fn, *data())
    assert captured.counts == {}
    assert any("dropout_p=0.5" in r for r in captured.reasons)


def test_three_dimensional_attention_is_left_alone() -> None:
    q, k, v = data(heads=GROUPS)
    captured = check(F.scaled_dot_product_attention, q[0], k[0], v[0], raised=0)
    assert any("3 dimensions" in r for r in captured.reasons)


def test_keys_and_values_of_different_widths_are_left_alone() -> None:
    q, k, v = data(heads=GROUPS)
    check(F.scaled_dot_product_attention, q, k, v[..., :8], raised=0)


def test_broadcast_batch_of_keys_is_left_alone_or_equal() -> None:
    q, k, v = data(heads=GROUPS)
    wanted = F.scaled_dot_product_attention(q, k[:1], v[:1])
    torch.testing.assert_close(capture(F.scaled_dot_product_attention, q, k[:1], v[:1]).result, wanted)
