"""budget_step and budget_guard as PyTorch operators. What they compute is held to an oracle in tests/thinking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt import native
from qwenopt.ops import BUDGET_GUARD, BUDGET_STEP
from qwenopt.ops.budget_state import NO_ID, Column, Phase


def step_args(rows: int = 3) -> tuple[Tensor, ...]:
    """Rows in the middle of a block, with half a budget left, and one that is writing its closing text."""
    state = torch.zeros(rows, 128, dtype=torch.int32)
    state[:, Column.PHASE], state[:, Column.USED], state[:, Column.BUDGET] = Phase.THINK, 4, 4
    state[:, Column.WINDOW_AT] = state[:, Column.RESERVE_AT] = state[:, Column.SINCE] = -1
    state[:, Column.BUDGET_LEN], state[:, Column.EXIT_LEN], state[:, Column.EXIT_TEXT] = 3, 1, 3
    state[:, Column.IMPLICIT : Column.IMPLICIT + 4] = NO_ID
    state[0, Column.BUDGET] = 9
    forced = torch.tensor([[5, 1, 6, 1]], dtype=torch.int32).repeat(rows, 1)
    lut = torch.full((10,), 128, dtype=torch.uint8)
    ids = torch.tensor([0, 1, 2, NO_ID, 9, NO_ID, NO_ID, NO_ID], dtype=torch.int32)
    return torch.full((rows,), 7), torch.zeros(rows, 3), state, forced, lut, ids


def guard_args(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    _, _, state, _, _, ids = step_args()
    state[0, Column.MIN] = 6
    state[1, Column.PHASE], state[1, Column.SINCE], state[1, Column.GUARD] = Phase.ANSWER, 0, 3
    state[2, Column.SOFT_BIAS] = torch.tensor(2.0).view(torch.int32)
    state[2, Column.BOUNDARY], state[2, Column.SOFT_WIDTH] = 128, 4
    return torch.randn(3, 10).to(dtype), state, ids


ARGS: dict[str, Any] = {"budget_step": step_args, "budget_guard": guard_args}
OVERLOADS = [
    (op, p) for op in (BUDGET_STEP, BUDGET_GUARD) for p in (None, *(p for p in op.providers if p.device == "cpu"))
]


@pytest.mark.parametrize(("op", "provider"), OVERLOADS, ids=lambda v: getattr(v, "name", "default"))
def test_opcheck(op: Any, provider: Any) -> None:
    if provider is not None and provider.available() is not None:
        pytest.skip(provider.available())
    torch.library.opcheck(op.default if provider is None else provider.overload, ARGS[op.name]())


def test_schemas_name_what_is_written() -> None:
    assert BUDGET_STEP.schema == (
        "(Tensor sampled, Tensor signals, Tensor(a2!) state, Tensor forced, Tensor lut, Tensor ids) -> Tensor"
    )
    assert BUDGET_GUARD.schema == "(Tensor(a0!) logits, Tensor state, Tensor ids) -> ()"


def test_a_step_of_each_kind() -> None:
    args = step_args()
    assert BUDGET_STEP(*args).tolist() == [7, 5, 5]
    assert BUDGET_STEP(*args).tolist() == [7, 1, 1]
    assert BUDGET_STEP(*args).tolist() == [7, 6, 6]
    assert args[2][:, Column.PHASE].tolist() == [Phase.THINK, Phase.ANSWER, Phase.ANSWER]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_guard_writes_single_logits(dtype: torch.dtype) -> None:
    logits, state, ids = guard_args(dtype)
    wanted = logits.clone()
    wanted[0, 1] = wanted[1, 0] = wanted[1, 1] = -torch.inf
    wanted[2, 1] = (wanted[2, 1].float() + 2.0).to(dtype)
    BUDGET_GUARD(logits, state, ids)
    assert torch.equal(logits, wanted)


def test_rows_of_wider_logits_are_guarded_where_they_lie() -> None:
    logits, state, ids = guard_args()
    wide = torch.randn(3, 16)
    wide[:, :10] = logits
    rest = wide[:, 10:].clone()
    BUDGET_GUARD(wide[:, :10], state, ids)
    BUDGET_GUARD(logits, state, ids)
    assert torch.equal(wide, torch.cat([logits, rest], 1))


def test_no_rows() -> None:
    args = step_args(1)
    none = [a[:0] for a in args[:4]]
    assert BUDGET_STEP(*none, *args[4:]).shape == (0,)
    BUDGET_GUARD(torch.empty(0, 10), none[2], args[5])


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        (0, torch.zeros(2, dtype=torch.int64), r"sampled \(2,\), state \(3, 128\) and forced \(3, 4\) must be \(R,\)"),
        (2, torch.zeros(3, 64, dtype=torch.int32), r"state \(3, 64\)"),
        (3, torch.zeros(3, 0, dtype=torch.int32), r"forced \(3, 0\)"),
        (1, torch.zeros(3, 2), r"signals \(3, 2\)"),
        (4, torch.zeros(0, dtype=torch.uint8), r"lut \(0,\)"),
        (5, torch.zeros(4, dtype=torch.int32), r"ids \(4,\)"),
        (0, torch.zeros(3, dtype=torch.int32), r"torch.int32 where torch.int64 is needed"),
        (1, torch.zeros(3, 3).bfloat16(), r"torch.bfloat16 where torch.float32 is needed"),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["op", "torch.ops", "provider"])
def test_wrong_arguments_are_named(place: int, value: Tensor, text: str, way: str) -> None:
    if way == "provider" and native.why_not() is not None:
        pytest.skip(f"no kernel: {native.why_not()}")
    args = list(step_args())
    args[place] = value
    calls = {"op": BUDGET_STEP, "torch.ops": BUDGET_STEP.default, "provider": BUDGET_STEP.providers[0].overload}
    with pytest.raises(RuntimeError, match=f"budget_step: .*{text}|budget_step: {text}"):
        calls[way](*args)


def test_wrong_arguments_of_the_guard_are_named() -> None:
    logits, state, ids = guard_args()
    with pytest.raises(RuntimeError, match=r"budget_guard: logits \(2, 10\), state \(3, 128\)"):
        BUDGET_GUARD(logits[:2], state, ids)
    with pytest.raises(RuntimeError, match=r"budget_guard: torch.int64, torch.int32, torch.int32 where floating"):
        BUDGET_GUARD(logits.long(), state, ids)
