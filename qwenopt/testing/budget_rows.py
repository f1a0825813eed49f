"""Rows of thinking state as no configuration would make them: every way through budget_step and budget_guard."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.budget_state import FLOATS, HASH_MASK, NO_ID, RING, Column

ROWS, VOCAB, LENGTH = 64, 50, 12


def random_rows(seed: int) -> list[Tensor]:
    """The arguments of budget_step: 64 rows in every phase, whose small random numbers bring all conditions both ways.

    sampled, signals, state, forced [64, LENGTH], lut [VOCAB - 3] and ids, as `qwenopt.ops.budget_step` has them.
    """
    torch.manual_seed(seed)
    state = torch.randint(-1, 7, (ROWS, 128), dtype=torch.int32)
    state[:, Column.PHASE] = torch.randint(0, 7, (ROWS,))
    state[:, Column.PENDING] = torch.randint(0, 7, (ROWS,))
    state[:, Column.CTRL] = torch.rand(ROWS) < 0.1
    for column in sorted(FLOATS):
        state[:, column] = torch.rand(ROWS).view(torch.int32)
    state[:, Column.IMPLICIT : Column.IMPLICIT + 4] = torch.tensor([3, NO_ID, NO_ID, NO_ID])
    state[:, Column.LAST] = torch.randint(0, 256, (ROWS,))
    for column in (Column.BUDGET_SKIP, Column.EXIT_SKIP):
        state[:, column] = torch.randint(0, 2, (ROWS,))
    state[:, Column.LOOP_HASH] = torch.randint(0, HASH_MASK, (ROWS,))
    state[:, Column.LOOP_NEXT] = torch.randint(0, RING, (ROWS,))
    ids = torch.tensor([0, 1, 2, NO_ID, 4, 5, NO_ID, NO_ID], dtype=torch.int32)
    sampled = torch.where(torch.rand(ROWS) < 0.5, torch.randint(-2, 7, (ROWS,)), torch.randint(0, VOCAB, (ROWS,)))
    forced = torch.randint(0, VOCAB, (ROWS, LENGTH), dtype=torch.int32)
    lut = torch.randint(0, 256, (VOCAB - 3,), dtype=torch.uint8)  # some ids lie outside
    return [sampled, torch.rand(ROWS, 3), state, forced, lut, ids]
