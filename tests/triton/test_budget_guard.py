"""budget_guard's kernel, interpreted: the bits of the reference, in the logits that it changes and in all others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwenopt.ops.budget_guard import budget_guard as reference
from qwenopt.ops.budget_state import NO_ID, Column, Id, Phase
from qwenopt.testing.budget_rows import ROWS, VOCAB, random_rows
from qwenopt.testing.interpreted import Run

# bfloat16 is not rounded as it should be by the interpreter.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def arguments(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    _, _, state, _, _, ids = random_rows(seed)
    state[:, Column.SINCE] = torch.randint(-1, 4, (ROWS,))
    return (3 * torch.randn(ROWS, VOCAB)).to(dtype), state, ids


def check(run: Run, logits: Tensor, state: Tensor, ids: Tensor) -> Tensor:
    """The logits as the reference leaves them; the kernel must leave them so, too."""
    expected = logits.clone()
    reference(expected, state, ids)
    _, after = run("budget_guard", logits, state, ids)
    assert torch.equal(after[0], expected)
    assert torch.equal(after[1], state)
    return expected


@DTYPES
@pytest.mark.parametrize("seed", range(8))
def test_random_rows(run: Run, seed: int, dtype: torch.dtype) -> None:
    check(run, *arguments(seed, dtype))


@DTYPES
def test_the_soft_bias(run: Run, dtype: torch.dtype) -> None:
    logits, state, ids = arguments(9, dtype)
    state[:, Column.PHASE], state[:, Column.USED], state[:, Column.MIN] = Phase.THINK, torch.arange(ROWS), 0
    state[:, Column.SOFT_AT], state[:, Column.SOFT_WIDTH] = 7, 49  # thirds, sevenths: quotients that are rounded
    state[:, Column.BOUNDARY] = torch.tensor([128, 4]).repeat(ROWS // 2)
    state[:, Column.NEED] = torch.tensor([0, 0, 1, 1]).repeat(ROWS // 4)
    expected = check(run, logits, state, ids)
    assert (expected != logits).any(1).sum() > 20


def test_ids_outside_the_vocabulary(run: Run) -> None:
    logits, state, ids = arguments(1)
    state[:, Column.PHASE] = torch.tensor([Phase.THINK, Phase.ANSWER]).repeat(ROWS // 2)
    ids[Id.START], ids[Id.END], ids[Id.EOS] = VOCAB, NO_ID, -1
    check(run, logits, state, ids)
    ids[Id.START], ids[Id.END], ids[Id.EOS] = VOCAB - 1, VOCAB, 0
    check(run, logits, state, ids)


def test_rows_of_wider_logits(run: Run) -> None:
    logits, state, ids = arguments(2)
    wide = torch.cat([logits, torch.full((ROWS, 7), 5.0)], 1)
    _, (after, *_) = run("budget_guard", wide[:, :VOCAB], state, ids)
    reference(logits, state, ids)
    assert torch.equal(after, logits)
    assert torch.equal(after.as_strided(wide.shape, wide.stride())[:, VOCAB:], wide[:, VOCAB:])


def test_no_rows(run: Run) -> None:
    logits, state, ids = arguments(0)
    check(run, logits[:0], state[:0], ids)
