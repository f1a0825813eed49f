"""Several tokens at once: a forced text in one forward, drafts checked by the target, rows brought back from tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from qwenopt.ops.budget_state import NO_ID, Column, Phase
from qwenopt.runtime.thinking_state import ThinkingState

NOTHING = -1  # as a sampled token: one that means nothing


def forced_ahead(state: ThinkingState, row: int) -> list[int]:
    """The tokens that the row will be forced to write next; [] while it is free. Reads the state.

    They are known as soon as the first one is written, so one forward may take them all; `take_forced` then makes the
    state what as many steps would have made it.
    """
    if int(state.state[row, Column.PHASE]) != Phase.FORCE:  # one number, since a loop may ask after every step
        return []
    s = state.state[row].tolist()
    first, last = s[Column.FPTR] + s[Column.FPOS], s[Column.FPTR] + s[Column.FLEN]
    return [int(token) for token in state.forced[row, first:last].tolist()]


def take_forced(state: ThinkingState, row: int, most: int | None = None) -> list[int]:
    """The first `most` of `forced_ahead` (None: all), with the row moved behind them."""
    ahead = forced_ahead(state, row)[:most]
    if ahead:
        state.step_row(row, ahead)
    return ahead


def verify_draft(state: ThinkingState, draft: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Check drafted tokens against the target model's, under thinking control; no host read, static shapes.

    draft int64 [R, k]; target int64 [R, k + 1], the target's own choice at each position, given the draft before it.
    Returns `(ids, count)`: ids int64 [R, k + 1], of which the first count (int64 [R], 1..k + 1) are emitted: the tokens
    that the draft got right, then the first that it did not. The state of each row is as after its count steps.
    Signals of exit rules are those of the call before: rules other than the loop rule are looked at once per call.
    """
    rows, k = draft.shape
    alive = torch.ones(rows, dtype=torch.bool, device=draft.device)
    ids, count = [], torch.zeros(rows, dtype=torch.int64, device=draft.device)
    for j in range(k + 1):
        token = state.step(target[:, j], alive)
        ids.append(torch.where(alive, token, NO_ID))
        count = count + alive
        if j < k:
            alive = alive & (token == draft[:, j])
    return torch.stack(ids, 1), count


def replay(state: ThinkingState, row: int, ids: Sequence[int], forced: Collection[int] = ()) -> None:
    """Bring a freshly admitted row to where it was after it had emitted `ids`.

    All but the exit rules' averages and a manual end is a function of the tokens and of which of them were forced
    (`forced`, their places): a `</think>` that was forced looks like the model's own. Raises ValueError where the
    tokens are not what this configuration would have emitted; a row with exit rules must be saved and restored instead.
    """
    rules = (Column.MARGIN_AT, Column.ENTROPY_AT, Column.PROBE_AT)
    if any(int(state.state[row, column]) for column in rules):
        raise ValueError(f"replay: row {row} has exit rules, whose signals are not in the tokens; use save and restore")
    alone = torch.arange(state.rows, device=state.state.device) == row

    def emitted(sampled: int) -> int:
        return int(state.step(torch.full_like(alone, sampled, dtype=torch.int64), alone)[row])

    for i, token in enumerate(ids):
        # A forced token was sampled as something else: anything where a block had to end, else an end of the text.
        tries = [NOTHING, *state.tokens.eos] if i in forced else [token]
        before = state.save(row)
        for sampled in tries:
            state.restore(row, before)
            found = emitted(sampled)
            if found == token:
                break
        else:
            raise ValueError(f"replay: token {i} of row {row} is {token}, but its configuration emits {found} there")
