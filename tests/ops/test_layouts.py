"""Arguments that lie otherwise in memory, and rows that come in another order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops import OPS
from qwenopt.testing.cases import CASES, Case, case
from qwenopt.testing.results import results

# One spelling of each case is enough here: the ordinary shapes.
ORDINARY = [c for c in CASES if c.name in ("prefill", "left padding", "positions", "causal", "batch", "decode", "bias")]


def padded_rows(x: Tensor) -> Tensor:
    """The same values as every other column block of a wider tensor."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def every_other(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def shifted(x: Tensor) -> Tensor:
    """An address that is not a multiple of a vector's size."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)
    flat[1:] = x.reshape(-1)
    return flat[1:].view(x.shape)


def column_major(x: Tensor) -> Tensor:
    return x.transpose(-2, -1).contiguous().transpose(-2, -1)


@pytest.mark.parametrize("case", ORDINARY, ids=str)
@pytest.mark.parametrize("relay", [padded_rows, every_other, shifted, column_major], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_of_arguments_changes_nothing(case: Case, relay: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    op, args = OPS[case.op], case.build(dtype)
    moved = tuple(relay(a) if isinstance(a, Tensor) and a.dim() > 1 and a.is_floating_point() else a for a in args)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    found, wanted = results(op, op, moved), results(op, op, args)
    if case.op == "moe_route":  # equal logits, frequent in bfloat16, may come in any order
        found, wanted = (found[0], args[0].gather(-1, found[1])), (wanted[0], args[0].gather(-1, wanted[1]))
    torch.testing.assert_close(found, wanted, **tolerance)


def rows_of(value: Any, order: Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(rows_of(v, order) for v in value)
    return value[order]


# (op, case, positions of the arguments with a batch or token axis)
ROWS = [
    ("rms_norm", "prefill", (0,)),
    ("add_rms_norm", "prefill", (0, 1)),
    ("silu_mul", "prefill", (0, 1)),
    ("linear", "batch", (0,)),
    ("linear", "bias", (0,)),
    ("qk_norm_rope", "tables of each row", (0, 1, 4, 5)),
    ("attention", "left padding", (0, 1, 2, 3)),
    ("attention", "causal", (0, 1, 2)),
    ("attention", "positions decode", (0, 1, 2)),
    ("moe_route", "prefill", (0,)),
    ("moe_experts", "prefill", (0, 1, 2)),
    ("moe_experts", "many tokens", (0, 1, 2)),
    ("top_tokens", "prefill", (0,)),
    ("logit_signals", "prefill", (0,)),
]


@pytest.mark.parametrize(("op", "name", "with_rows"), ROWS, ids=lambda v: str(v).replace(" ", "_"))
def test_order_of_rows_changes_no_row(op: str, name: str, with_rows: tuple[int, ...]) -> None:
    args = case(op, name).build()
    order = torch.randperm(args[0].shape[0], generator=torch.Generator().manual_seed(3))
    moved = tuple(a[order] if i in with_rows else a for i, a in enumerate(args))
    found, wanted = OPS[op](*moved), rows_of(OPS[op](*args), order)
    if OPS[op].choose(args).provider is not None:
        assert_equal(found, wanted)
    else:
        assert_near(found, wanted)


def assert_near(found: Any, wanted: Any) -> None:
    """Equal up to rounding: that of a library's matrix product depends on where in it a row lies."""
    for a, b in zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]:
        bound = 64 * torch.finfo(torch.float32).eps * b.abs().max().item()  # sums of up to 64 products
        torch.testing.assert_close(a, b, rtol=0, atol=bound)


def assert_equal(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["int32 ids", "strided ids", "strided weights"])
def test_routing_in_another_form_is_read_right(kind: str) -> None:
    x, indices, weights, gate_up, down = case("moe_experts", "prefill").build()
    wanted = OPS["moe_experts"].reference(x, indices, weights, gate_up, down)
    if kind == "int32 ids":
        indices = indices.to(torch.int32)
    elif kind == "strided ids":
        indices = indices.t().contiguous().t()
    else:
        weights = weights.t().contiguous().t()
    torch.testing.assert_close(OPS["moe_experts"](x, indices, weights, gate_up, down), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["int32", "strided"])
def test_query_positions_in_another_form_are_read_right(kind: str) -> None:
    q, k, v, mask, positions, causal, scale = case("attention", "positions").build()
    wanted = OPS["attention"].reference(q, k, v, mask, positions, causal, scale)
    positions = positions.to(torch.int32) if kind == "int32" else positions.repeat_interleave(2)[::2]
    torch.testing.assert_close(OPS["attention"](q, k, v, mask, positions, causal, scale), wanted)


def test_keys_of_a_longer_cache_are_read_in_place() -> None:
    q, k, v, *rest = case("attention", "left padding decode").build()
    cache = torch.full((4, 2, 64, 32), torch.nan)
    cache[:, :, : k.shape[2]] = k
    view = cache[:, :, : k.shape[2]]
    torch.testing.assert_close(OPS["attention"](q, view, v, *rest), OPS["attention"](q, k, v, *rest))


def test_keys_that_nobody_sees_do_not_matter() -> None:
    q, k, v, *rest = case("attention", "positions decode").build()
    wanted = OPS["attention"](q, k, v, *rest)
    k[:, :, 201:], v[:, :, 201:] = 1e30, -1e30
    torch.testing.assert_close(OPS["attention"](q, k, v, *rest), wanted, rtol=0, atol=0)


def test_expanded_weight_of_a_linear_is_read_right() -> None:
    x, row = torch.randn(2, 8), torch.randn(1, 8)
    weight = row.expand(5, 8)
    torch.testing.assert_close(OPS["linear"](x, weight, None), x @ weight.T)
