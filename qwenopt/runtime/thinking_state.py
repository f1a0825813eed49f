"""Thinking control as a module of static buffers: one row per slot of the batch, one graph for all configurations."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwenopt.ops.budget_guard import BUDGET_GUARD
from qwenopt.ops.budget_state import NO_ID, RING, WIDTH, Bit, Column, Id, Phase, Reason, Signal
from qwenopt.ops.budget_step import BUDGET_STEP
from qwenopt.ops.logit_signals import LOGIT_SIGNALS
from qwenopt.ops.op import call
from qwenopt.runtime.sample import Sampler
from qwenopt.runtime.thinking import ThinkingConfig, ThinkingStats, check_budget
from qwenopt.runtime.thinking_exits import BOUNDARY_BITS, EntropyRule, LoopRule, MarginRule, ProbeRule
from qwenopt.runtime.thinking_tokens import ThinkingTokens

SOFT_SHARE = 0.3  # of the budget, at its end, over which the soft bias grows
# Plain numbers for what Dynamo traces: it does not compare tensors with members of an enumeration.
_PHASE, _ANSWER = int(Column.PHASE), int(Phase.ANSWER)
_PROBE = int(Signal.PROBE)  # behind the two that logit_signals gives
UTF8_SLACK = 3  # tokens by which a whole character may put off a cut


class ThinkingState(nn.Module):
    """The thinking of up to `rows` sequences, in a decode step: `adjust_`, the sampler, `step`; or all by `forward`.

    `signals` names what exit rules will read ("margin", "entropy"): each costs a pass over the logits, so none is
    there by default, and `admit` refuses a rule whose signal is not. `probe` is a module from hidden [R, N] to a score
    [R]. `max_forced` is the room for closing texts of a row, in tokens. Rows start unused and pass tokens through.
    """

    def __init__(
        self,
        rows: int,
        tokens: ThinkingTokens,
        *,
        signals: Sequence[str] = (),
        probe: Callable[[Tensor], Tensor] | None = None,
        max_forced: int = 64,
        device: Any = None,
    ) -> None:
        super().__init__()
        if rows < 1:
            raise ValueError(f"ThinkingState: {rows} rows; it needs at least 1")
        if not set(signals) <= {"margin", "entropy"}:
            raise ValueError(f"ThinkingState: signals {tuple(signals)}; there are margin and entropy")
        self.rows, self.tokens, self.max_forced = rows, tokens, max_forced
        self.probe = probe
        self.reads = frozenset(signals) | (frozenset() if probe is None else frozenset({"probe"}))
        self.end = tokens.end

        def buffer(name: str, value: Tensor) -> None:
            self.register_buffer(name, value.to(device), persistent=False)

        buffer("state", torch.zeros(rows, WIDTH, dtype=torch.int32))
        buffer("forced", torch.full((rows, max_forced), NO_ID, dtype=torch.int32))
        buffer("signals", torch.zeros(rows, len(Signal)))
        buffer("lut", tokens.lut)
        buffer("ids", tokens.ids())

    state: Tensor
    forced: Tensor
    signals: Tensor
    lut: Tensor
    ids: Tensor

    # --- The decode step; everything below it is for the host, between steps. ---

    def forward(
        self, logits: Tensor, sampler: Sampler, active: Tensor | None = None, hidden: Tensor | None = None
    ) -> Tensor:
        """The tail of a decode step: logits [R, V] to ids int64 [R]. `adjust_` writes to the logits.

        Rows outside active (bool [R]; None: all) stay as they are, and what they get means nothing.
        """
        self.adjust_(logits, hidden)
        answering = self.answering() if sampler.reads_settings else None  # what nobody reads is computed all the same
        ids = self.step(sampler(logits, answering, active), active)
        sampler.observe(ids, active)
        return ids

    def adjust_(self, logits: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Before sampling: read the signals of the raw logits [R, V], then write the few that the rows' state asks for.

        In place; a row for which nothing is asked keeps every bit. `hidden` [R, N] is for the probe.
        """
        if self.reads:
            if self.reads & {"margin", "entropy"}:
                found = call(LOGIT_SIGNALS, logits, self.end, "entropy" in self.reads)
                self.signals[:, :_PROBE].copy_(found)
            if self.probe is not None and hidden is not None:
                self.signals[:, _PROBE].copy_(self.probe(hidden).reshape(-1))
        call(BUDGET_GUARD, logits, self.state, self.ids)
        return logits

    def step(self, sampled: Tensor, active: Tensor | None = None) -> Tensor:
        """After sampling: the tokens to emit, int64 [R], forced ones in place of sampled ones; advances the state.

        Rows outside active (bool [R]; None: all) keep their state and their sampled token.
        """
        given = sampled if active is None else torch.where(active, sampled, NO_ID)
        out: Tensor = call(BUDGET_STEP, given, self.signals, self.state, self.forced, self.lut, self.ids)
        return out if active is None else torch.where(active, out, sampled)

    def step_row(self, row: int, tokens: Sequence[int]) -> None:
        """`step` for tokens of one row, one after the other; the other rows are not looked at."""
        if not tokens:
            return
        one = slice(row, row + 1)
        columns = (self.signals[one], self.state[one], self.forced[one], self.lut, self.ids)
        given = torch.tensor(tokens, dtype=torch.int64, device=self.state.device).split(1)
        # Rows of one budget end together, each with a closing text: what all tokens share is looked at once.
        step = BUDGET_STEP.kernel(given[0], *columns)
        for token in given:
            step(token, *columns)

    def answering(self) -> Tensor:
        """Rows whose next token belongs to the answer, bool [R]."""
        return self.state[:, _PHASE] >= _ANSWER

    # --- Rows. ---

    def forcing(self) -> list[bool]:
        """Whether a text is being forced on each row; reads the state, so it waits for the device."""
        return (self.state[:, Column.PHASE] == Phase.FORCE).tolist()

    def admit(
        self, row: int, config: ThinkingConfig | None, prompt_ids: Iterable[int], max_new_tokens: int | None = None
    ) -> None:
        """Begin a sequence in `row`; `config` None is unlimited. Raises ValueError for what this state cannot do."""
        config, prompt = config or ThinkingConfig(), list(prompt_ids)
        values, texts = self._columns(config, prompt, max_new_tokens)
        host = [0] * (WIDTH - RING) + [-1] * RING
        for i, token in enumerate([*self.tokens.implicit_ends(config), *[NO_ID] * 4][:4]):
            host[Column.IMPLICIT + i] = token
        for column, value in values.items():
            host[column] = bits(value) if isinstance(value, float) else int(value)
        table = torch.full((self.max_forced,), NO_ID, dtype=torch.int32)
        table[: len(texts)] = torch.tensor(texts, dtype=torch.int32)
        columns = torch.tensor(host, dtype=torch.int32)
        self.state[self._row(row)], self.forced[row] = columns.to(self.state.device), table.to(self.state.device)

    def _columns(
        self, config: ThinkingConfig, prompt: list[int], max_new_tokens: int | None
    ) -> tuple[dict[Column, Any], list[int]]:
        """The first state of a row, and its closing texts one after the other."""
        tokens, budget = self.tokens, config.budget
        phase, before = tokens.initial_phase(prompt)
        of_budget = tokens.text("stop_text", "short" if budget == 0 else config.stop_text)
        of_exit = tokens.text("exit_stop_text", config.exit_stop_text)
        table = [*of_budget, *of_exit]
        values: dict[Column, Any] = {
            Column.PHASE: phase,
            Column.SINCE: -1,
            Column.EXIT_STEP: -1,
            Column.BLOCKS: phase == Phase.THINK,
            Column.REASON: Reason.DISABLED if phase == Phase.ANSWER else Reason.NONE,
            Column.USED: before if config.count_prompt else 0,
            Column.BUDGET: -1 if budget is None else budget,
            Column.WINDOW_AT: budget - config.window if budget and config.window else -1,
            Column.MIN: config.min_tokens,
            Column.WAIT: config.min_action == "wait",
            Column.RESERVE_AT: self._reserve_at(config, len(of_budget), max_new_tokens),
            Column.BLOCK: config.scope == "block",
            Column.CLOSE: config.closes_on_eos,
            Column.WHOLE: config.boundary != "none",
            Column.BOUNDARY: BOUNDARY_BITS["any" if config.boundary == "none" else config.boundary],
            Column.BUDGET_LEN: len(of_budget),
            Column.BUDGET_SKIP: self._skips(of_budget, "short" if budget == 0 else config.stop_text),
            Column.EXIT_TEXT: len(of_budget),
            Column.EXIT_LEN: len(of_exit),
            Column.EXIT_SKIP: self._skips(of_exit, config.exit_stop_text),
            Column.GUARD: config.reclose_guard,
            Column.MIN_ANSWER: config.min_answer_tokens,
            **self._exits(config),
        }
        if budget and config.soft_bias:
            width = max(1, int(budget * SOFT_SHARE))
            values |= {Column.SOFT_BIAS: float(config.soft_bias), Column.SOFT_AT: budget - width}
            values[Column.SOFT_WIDTH] = width
        if budget == 0 and phase == Phase.IDLE and tokens.hybrid:
            values |= {Column.PHASE: Phase.FORCE, Column.REASON: Reason.DISABLED, Column.EXIT_STEP: 0}
            values |= {Column.FPTR: len(table), Column.FLEN: len(tokens.empty_block)}
            table += tokens.empty_block
        if len(table) > self.max_forced:
            raise ValueError(
                f"ThinkingState: closing texts of {len(table)} tokens in rows of {self.max_forced}; "
                f"make the state with max_forced={len(table)}"
            )
        if prompt:  # a boundary or half a character at its end
            last = int(tokens.lut[prompt[-1]])
            values[Column.LAST] = last
            values[Column.NEED] = 0 if last & Bit.CONTINUES else (last & Bit.MISSING) >> 4
        return values, table

    def _skips(self, ids: tuple[int, ...], text: Any) -> bool:
        """Whether the first newline may be left out behind one: of the short text only, so that others stay whole."""
        return text == "short" and len(ids) > 1 and ids[0] in self.tokens.newlines

    def _reserve_at(self, config: ThinkingConfig, length: int, max_new_tokens: int | None) -> int:
        if not config.reserve_answer:
            return -1
        if max_new_tokens is None:
            raise ValueError(f"ThinkingConfig: reserve_answer {config.reserve_answer} needs max_new_tokens")
        slack = UTF8_SLACK if config.boundary != "none" else 0
        return max(0, max_new_tokens - config.reserve_answer - length - slack)

    def _exits(self, config: ThinkingConfig) -> dict[Column, Any]:
        values: dict[Column, Any] = {}
        for rule in config.exits:
            at = BOUNDARY_BITS[rule.boundary]
            if isinstance(rule, MarginRule):
                self._need_signal("margin", 'signals=("margin",)')
                values |= {Column.MARGIN_AT: at, Column.MARGIN_TAU: float(rule.tau)}
                values[Column.MARGIN_PATIENCE] = rule.patience
            elif isinstance(rule, ProbeRule):
                self._need_signal("probe", "probe=...")
                values |= {Column.PROBE_AT: at, Column.PROBE_TAU: float(rule.tau)}
                values[Column.PROBE_PATIENCE] = rule.patience
            elif isinstance(rule, EntropyRule):
                self._need_signal("entropy", 'signals=("entropy",)')
                values |= {Column.ENTROPY_AT: at, Column.ENTROPY_AFTER: rule.after}
                values |= {Column.ENTROPY_ETA: float(rule.mean), Column.ENTROPY_DELTA: float(rule.variance)}
                values[Column.ENTROPY_ALPHA] = float(rule.alpha)
            elif isinstance(rule, LoopRule):
                values |= {Column.LOOP_AT: at, Column.LOOP_TIMES: rule.times}
        return values

    def _need_signal(self, name: str, how: str) -> None:
        if name not in self.reads:
            raise ValueError(
                f"ThinkingState: the {name} rule reads what this state does not compute; make it with {how}"
            )

    def _row(self, row: int) -> int:
        if not 0 <= row < self.rows:
            raise IndexError(f"ThinkingState: row {row}; there are rows 0..{self.rows - 1}")
        return row

    def release(self, row: int) -> None:
        """Empty a row: it passes tokens through."""
        self.state[self._row(row)] = 0

    def end_now(self, row: int) -> None:
        """End the row's thinking at the next step, whatever its configuration says."""
        self.state[self._row(row), Column.CTRL] = 1

    def set_budget(self, row: int, budget: int | None) -> None:
        """Give a running row another budget; tokens already thought count. Its window and soft bias end."""
        limit = check_budget(budget)
        self.state[self._row(row), Column.BUDGET] = -1 if limit is None else limit
        self.state[row, Column.WINDOW_AT] = -1
        self.state[row, Column.SOFT_BIAS] = 0

    def permute_rows(self, order: Tensor | Sequence[int]) -> None:
        """Row i becomes what row `order[i]` was, for all rows at once; also copies, as beams need."""
        index = torch.as_tensor(order, device=self.state.device)
        for buffer in (self.state, self.forced, self.signals):
            buffer.copy_(buffer[index])

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows."""
        order = list(range(self.rows))
        order[self._row(a)], order[self._row(b)] = b, a
        self.permute_rows(order)

    def save(self, row: int) -> tuple[Tensor, Tensor]:
        """All that a row is, to be put back by `restore`, here or in another state of the same size."""
        return self.state[self._row(row)].clone(), self.forced[row].clone()

    def restore(self, row: int, saved: tuple[Tensor, Tensor]) -> None:
        """Put back what `save` gave."""
        self.state[self._row(row)], self.forced[row] = saved

    def stats(self, row: int) -> ThinkingStats:
        """What the row's thinking has come to; reads the state, so it waits for the device."""
        s = self.state[self._row(row)].tolist()
        return ThinkingStats(
            tokens=s[Column.THOUGHT],
            forced_tokens=s[Column.FORCED],
            blocks=s[Column.BLOCKS],
            reason=Reason(s[Column.REASON]).name.lower(),
            exit_step=s[Column.EXIT_STEP] if s[Column.EXIT_STEP] >= 0 else None,
            answer_tokens=s[Column.ANSWERED],
            marker_tokens=s[Column.MARKERS],
        )


def bits(value: float) -> int:
    """The bits of a float32, as an int32."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


__all__ = ["Id", "ThinkingState", "bits"]
