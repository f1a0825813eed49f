"""Every op against a second formula in float64: the reference, and every provider no further from it than allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops import OPS, Provider
from qwenopt.testing.cases import CASES, Case
from qwenopt.testing.formulas import FORMULAS
from qwenopt.testing.results import results
from qwenopt.testing.tolerance import assert_as_accurate

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
PURE = [op for op in OPS.values() if not op.mutates]
PROVIDERS = [pytest.param(op, p, id=f"{op.name}.{p.name}") for op in PURE for p in op.providers]


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def usable(provider: Provider, args: tuple[Any, ...]) -> None:
    reason = provider.available() or provider.accepts(*args)
    if reason is not None:
        pytest.skip(f"{provider.name}: {reason}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_computes_the_formula(case: Case) -> None:
    op, args = OPS[case.op], case.build(torch.float64)
    found, wanted = results(op, op.reference, args), as_tuple(FORMULAS[case.op](*args))
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        # The norms and the router compute in float32 whatever they are given: this shows the formula, not the digits.
        torch.testing.assert_close(a.to(b.dtype), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_provider_is_as_accurate_as_the_reference(case: Case, dtype: torch.dtype) -> None:
    op, args = OPS[case.op], case.build(dtype)
    for provider in (p for p in op.providers if p.device == "cpu"):  # where the cases are
        usable(provider, args)
        found, eager = results(op, provider.fn, args), results(op, op.reference, args)
        truths = as_tuple(FORMULAS[case.op](*args))
        assert len(found) == len(eager)
        for a, e, t in zip(found, eager, truths, strict=True):
            if e.dtype.is_floating_point:
                assert_as_accurate(a, e, t)
            elif op.name == "moe_route":
                assert a.dtype == e.dtype
                assert_same_experts(a, e, args[0])
            else:
                torch.testing.assert_close(a, e, rtol=0, atol=0)
            assert a.stride() == e.stride() or a.numel() == 0 or 1 in a.shape


def assert_same_experts(found: Tensor, wanted: Tensor, logits: Tensor) -> None:
    """Equal ids, except where logits are equal: then any order of them."""
    assert torch.equal(logits.gather(-1, found), logits.gather(-1, wanted))
    assert all(len(set(row)) == len(row) for row in found.tolist())


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_arguments_are_left_as_they_were(case: Case, dtype: torch.dtype) -> None:
    op, args, same = OPS[case.op], case.build(dtype), case.build(dtype)
    op(*args)
    for name, a, b in zip(op.signature.parameters, args, same, strict=True):
        if isinstance(a, Tensor) and name not in op.mutates:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_run_gives_the_same_bits(case: Case, dtype: torch.dtype) -> None:
    args = case.build(dtype)
    op = OPS[case.op]
    first, second = results(op, op, args), results(op, op, args)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_thread_count_changes_nothing_beyond_rounding(case: Case) -> None:
    args, threads = case.build(), torch.get_num_threads()
    found: list[tuple[Tensor, ...]] = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(results(OPS[case.op], OPS[case.op], args))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


BFLOAT16_ALONE = {(op, name) for op in ("paged_attention", "linear_argmax") for name in ("cuda", "cupy")}


@pytest.mark.parametrize(("op", "provider"), PROVIDERS)
def test_every_provider_has_a_case_that_it_accepts(op: Any, provider: Provider) -> None:
    dtype = torch.bfloat16 if (op.name, provider.name) in BFLOAT16_ALONE else torch.float32
    assert any(provider.accepts(*c.build(dtype)) is None for c in CASES if c.op == op.name)
