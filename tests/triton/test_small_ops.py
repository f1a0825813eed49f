"""Norms, rotation, gate and router, interpreted: as accurate as eager, its cast order, any layout that graphs give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops import OPS
from qwenopt.testing.cases import CASES, Case, case
from qwenopt.testing.formulas import FORMULAS
from qwenopt.testing.interpreted import Run
from qwenopt.testing.results import results
from qwenopt.testing.tolerance import assert_as_accurate

SMALL = ("rms_norm", "add_rms_norm", "silu_mul", "qk_norm_rope", "moe_route")
# The interpreter does not round to bfloat16.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def kernel(run: Run, op: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """What the kernel gives; what it was given stays as it was."""
    found, after = run(op, *args)
    for given, left in zip(args, after, strict=True):
        torch.testing.assert_close(left, given, rtol=0, atol=0, equal_nan=True)
    return as_tuple(found)


def check(run: Run, op: str, args: tuple[Any, ...]) -> None:
    found, eager = kernel(run, op, args), results(OPS[op], OPS[op].reference, args)
    truths = as_tuple(FORMULAS[op](*args))
    assert len(found) == len(eager)
    for a, e, t in zip(found, eager, truths, strict=True):
        if e.dtype.is_floating_point:
            assert_as_accurate(a, e, t)
        else:  # experts with equal logits may come in any order
            assert a.dtype == e.dtype
            assert torch.equal(args[0].gather(-1, a), args[0].gather(-1, e))
            assert all(len(set(row)) == len(row) for row in a.tolist())
        assert a.stride() == e.stride() or a.numel() == 0 or 1 in a.shape


@DTYPES
@pytest.mark.parametrize("case", [c for c in CASES if c.op in SMALL], ids=str)
def test_as_accurate_as_eager(run: Run, case: Case, dtype: torch.dtype) -> None:
    check(run, case.op, case.build(dtype))


@DTYPES
@pytest.mark.parametrize("cols", [5, 64])
def test_several_rows_in_a_program(run: Run, cols: int, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(2100, cols).to(dtype) for _ in range(2))
    weight = torch.rand(cols).to(dtype)
    check(run, "rms_norm", (x, weight, 1e-6))
    check(run, "add_rms_norm", (x, residual, weight, 1e-6))


@DTYPES
@pytest.mark.parametrize(("heads", "groups"), [(16, 8), (5, 1)])
def test_several_heads_in_a_program(run: Run, heads: int, groups: int, dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 35, heads, 8), torch.randn(2, 35, groups, 8)
    tables = [torch.randn(2, 35, 8) for _ in range(2)]
    args = (q, k, torch.rand(8), torch.rand(8), *tables)
    check(run, "qk_norm_rope", (*(a.to(dtype) for a in args), 1e-6))


def test_a_row_of_several_programs(run: Run) -> None:
    check(run, "silu_mul", (torch.randn(3, 2500), torch.randn(3, 2500)))


@pytest.mark.parametrize("op", SMALL)
def test_casts_are_where_eager_has_them(run: Run, op: str) -> None:
    """A cast that is missing or elsewhere changes the last bit of many results; other sums and roots that of few.

    A result with an error of e before it is rounded falls on the other side of a tie with a probability of 2 e / ulp.
    Sums of 96 terms in another order: sqrt(96) 2^-24 / 2^-11, 0.1 %.
    """
    args = case(op, "prefill").build(torch.float16)
    found, eager = kernel(run, op, args)[0], results(OPS[op], OPS[op].reference, args)[0]
    assert (found != eager).float().mean() < 0.005


def _last_token(x: Tensor) -> Tensor:
    return torch.cat([torch.full_like(x, torch.nan), x], 1)[:, x.shape[1] :]


def _merged(*parts: Tensor) -> tuple[Tensor, ...]:
    """The same values as neighbouring columns of one matrix."""
    return torch.cat(parts, -1).split([part.shape[-1] for part in parts], -1)


def _relaid(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if op == "rms_norm":
        x, *rest = args
        return (_last_token(x[:, -1:]), *rest)
    if op == "add_rms_norm":
        x, residual, *rest = args
        return (_merged(x.flatten(0, 1), x.flatten(0, 1))[0], residual.flatten(0, 1), *rest)
    if op == "silu_mul":
        return _merged(*(x.flatten(0, 1) for x in args))
    if op == "moe_route":
        return (_merged(args[0], args[0])[0], *args[1:])
    q, k, *weights, cos, sin, eps = args
    _, flat_k = _merged(q.flatten(2), k.flatten(2))
    tables = (t.repeat(1, 1, 2)[..., : q.shape[3]].expand(q.shape[0], -1, -1) for t in (cos, sin))
    return _merged(q, q)[1], flat_k.unflatten(2, k.shape[2:]), *weights, *tables, eps


@pytest.mark.parametrize("op", SMALL)
def test_layouts_that_graphs_hand_over(run: Run, op: str) -> None:
    moved = _relaid(op, case(op, "prefill").build())
    assert not all(a.is_contiguous() for a in moved if isinstance(a, Tensor))
    accepts = next(p.accepts for p in OPS[op].providers if p.name == "triton")
    assert accepts(*moved) is None
    plain = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in moved)
    for found, wanted in zip(kernel(run, op, moved), kernel(run, op, plain), strict=True):
        assert torch.equal(found, wanted)
        assert found.stride() == wanted.stride()


def test_equal_logits_come_in_order(run: Run) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -0.0, 0.0, 3.0], [0.0, -0.0, 0.0, -1.0, -0.0, -2.0], [2.0] * 6])
    _, indices = kernel(run, "moe_route", (logits, 4, True))
    assert indices.tolist() == [[1, 2, 5, 0], [0, 1, 2, 4], [0, 1, 2, 3]]


def test_logits_that_are_no_numbers_name_experts_that_exist(run: Run) -> None:
    logits = torch.randn(5, 6)
    logits[0, 4] = torch.tensor(-(1 << 22), dtype=torch.int32).view(torch.float32)  # a NaN whose sign is set
    logits[1], logits[2], logits[3, 2] = torch.nan, -torch.inf, torch.inf
    logits[4, :5] = -torch.inf
    weights, indices = kernel(run, "moe_route", (logits, 3, True))
    wanted = OPS["moe_route"].reference(logits, 3, True)[0]
    torch.testing.assert_close(weights, wanted, equal_nan=True)
    assert indices[0, 0] == 4
    assert indices[1:3].tolist() == [[0, 1, 2]] * 2
    assert indices[4].tolist() == [5, 0, 1]
    assert ((indices >= 0) & (indices < 6)).all()
