"""top_tokens and logit_signals: interpreted, the ids of a stable sort and entropies as eager has them; compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops import LOGIT_SIGNALS
from qwenopt.ops.triton import logit_signals, top_tokens
from qwenopt.testing.compiled import compiled
from qwenopt.testing.formulas import logit_signals as formula
from qwenopt.testing.interpreted import Run
from qwenopt.testing.tolerance import assert_as_accurate

# The interpreter does not round to bfloat16.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
KINDS = ("random", "rounded", "equal", "hidden", "nan", "zeros")


def logits_of(kind: str, rows: int, vocab: int) -> Tensor:
    x = torch.randn(rows, vocab)
    if kind == "rounded":
        return (3 * x).round()
    if kind == "equal":
        return torch.full_like(x, -2.5)
    if kind == "zeros":
        return torch.where(x < 0, -0.0, 0.0)
    hidden = {"hidden": -torch.inf, "nan": torch.nan}.get(kind)
    return x if hidden is None else x.masked_fill(torch.rand(rows, vocab) < 0.9, hidden)


def sorted_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ids = logits.sort(dim=-1, descending=True, stable=True)[1][:, :k]
    return logits.gather(1, ids), ids


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_top_tokens_are_those_of_a_stable_sort(run: Run, kind: str, dtype: torch.dtype) -> None:
    for rows, vocab, ks in ((2, 9001, (1, 5, 64)), (3, 33, (1, 20)), (2, 1, (1,))):
        logits = logits_of(kind, rows, vocab).to(dtype)
        for k in ks:
            (values, ids), (after, _) = run("top_tokens", logits, k)
            wanted, wanted_ids = sorted_tokens(logits, k)
            assert torch.equal(ids, wanted_ids)
            torch.testing.assert_close(values, wanted, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(values.signbit() & (values == 0), wanted.signbit() & (wanted == 0))
            torch.testing.assert_close(after, logits, rtol=0, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 5.0, 40.0, "hidden", "equal"], ids=str)
def test_signals_are_as_accurate_as_eager(run: Run, scale: Any, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 9001) * (scale if isinstance(scale, float) else 1)
    if scale == "hidden":
        logits[:, torch.arange(9001) % 7 > 0] = -torch.inf
        logits[:, 4096:8192] = -torch.inf  # a part of nothing else
    elif scale == "equal":
        logits.zero_()
    logits, end = logits.to(dtype), 7
    found, _ = run("logit_signals", logits, end, True)
    eager = LOGIT_SIGNALS.reference(logits, end, True)
    assert torch.equal(found[:, 0], eager[:, 0])
    assert_as_accurate(found[:, 1], eager[:, 1], formula(logits, end, True)[:, 1])
    alone, _ = run("logit_signals", logits, end, False)
    assert torch.equal(alone[:, 0], eager[:, 0])
    assert not alone[:, 1].any()


@pytest.mark.parametrize("vocab", [9, 5000])
def test_rows_without_a_distribution_have_nan(run: Run, vocab: int) -> None:
    logits = torch.randn(6, vocab)
    logits[0, -1], logits[1, -1], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3] = -torch.inf
    logits[3, -1] = 2.0  # certain: no entropy
    logits[4, 0], logits[4, -1] = torch.nan, torch.inf
    for entropy in (True, False):
        found, _ = run("logit_signals", logits, 1, entropy)
        wanted = LOGIT_SIGNALS.reference(logits, 1, entropy)
        assert torch.equal(found[:, 0].nan_to_num(-1), wanted[:, 0].nan_to_num(-1))
        assert torch.equal(found[:, 1].isnan(), wanted[:, 1].isnan())
        has = ~wanted[:, 1].isnan()
        if entropy:
            assert_as_accurate(found[has, 1], wanted[has, 1], formula(logits[has], 1, True)[:, 1])
        else:
            assert torch.equal(found[has, 1], wanted[has, 1])


def test_rows_may_lie_apart(run: Run) -> None:
    logits = torch.randn(4, 2, 5000)[:, 1]
    (_, ids), _ = run("top_tokens", logits, 3)
    assert torch.equal(ids, sorted_tokens(logits, 3)[1])
    found, _ = run("logit_signals", logits, 0, True)
    assert torch.equal(found, run("logit_signals", logits.contiguous(), 0, True)[0])


def test_what_they_take() -> None:
    logits = torch.zeros(2, 100)
    assert top_tokens.accepts(logits, 64) is None
    assert "k 65 (the kernel has up to 64)" in str(top_tokens.accepts(logits, 65))
    assert "logits has dtype torch.float64" in str(top_tokens.accepts(logits.double(), 1))
    assert "600000 logits in a row" in str(top_tokens.accepts(torch.empty(1, 600_000, device="meta"), 1))
    assert logit_signals.accepts(logits, 0, True) is None
    assert "logits has stride" in str(logit_signals.accepts(torch.zeros(100, 2).T, 0, True))


@pytest.mark.parametrize("k", [1, 20, 64])
def test_top_tokens_compiles(k: int, capability: int) -> None:
    kernels = compiled(capability, top_tokens.top_tokens, torch.zeros(2, 151936, dtype=torch.bfloat16), k)
    assert [kernel.name for kernel in kernels] == ["top_parts_kernel", "top_tokens_kernel"]
    assert all(kernel.spill_bytes == 0 for kernel in kernels)
    assert all(kernel.registers <= 128 for kernel in kernels)


@pytest.mark.parametrize("entropy", [False, True])
def test_logit_signals_compiles(entropy: bool, capability: int) -> None:
    kernels = compiled(capability, logit_signals.logit_signals, torch.zeros(2, 151936).bfloat16(), 7, entropy)
    assert [kernel.name for kernel in kernels] == ["logit_parts_kernel", "logit_signals_kernel"]
    assert all(kernel.spill_bytes == 0 for kernel in kernels)
    assert all(kernel.registers <= 64 for kernel in kernels)
