"""Thinking control written a second time, from its specification, on lists and byte strings: what the op must equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qwenopt.runtime.thinking import ThinkingConfig, ThinkingStats
from qwenopt.runtime.thinking_exits import EntropyRule, LoopRule, MarginRule, ProbeRule
from qwenopt.runtime.thinking_tokens import REFLECTIONS, STOPS, ThinkingTokens

F32 = np.float32
assert REFLECTIONS


@dataclass
class Text:
    """A vocabulary as this oracle sees it: the bytes of each token."""

    pieces: Sequence[bytes]
    special: frozenset[int] = frozenset()

    def ends(self, token: int, kind: str) -> bool:
        """Whether the token ends a sentence, a line or a paragraph, each including the next."""
        if kind == "any":
            return True
        piece = b"" if token in self.special or not 0 <= token < len(self.pieces) else self.pieces[token]
        if all(0x80 <= byte < 0xC0 for byte in piece):
            return False
        line, paragraph = piece.endswith(b"\n"), piece.endswith(b"\n\n")
        if kind == "paragraph":
            return paragraph
        text = piece.decode("utf-8", "ignore").rstrip().rstrip("\"')]}*_»”’）」』】》")
        return line or (kind == "sentence" and text != "" and text[-1] in STOPS)

    def lacking(self, tokens: Sequence[int]) -> int:
        """How many bytes the last character of a text lacks."""
        stream = b""
        for token in reversed(tokens[-4:]):
            if token in self.special or not 0 <= token < len(self.pieces):
                break
            stream = self.pieces[token] + stream
        for more in range(4):
            for start in range(max(0, len(stream) - 3), len(stream)):
                lead = stream[start]
                size = 2 if 0xC0 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4 if lead >= 0xF0 else 0
                rest = stream[start + 1 :]
                if size and all(0x80 <= b < 0xC0 for b in rest) and len(rest) + 1 + more == size:
                    return more
        return 0


@dataclass
class Oracle:
    """One row. `step` takes what was sampled and returns what is emitted."""

    config: ThinkingConfig
    tokens: ThinkingTokens
    text: Text
    prompt: list[int]
    max_new: int | None = None
    out: list[int] = field(default_factory=list)
    phase: str = "idle"
    script: list[int] = field(default_factory=list)  # what is still to be forced
    used: int = 0
    manual: bool = False
    waited: int = 0
    pending: str = ""
    since: int | None = None
    reason: str = "none"
    exit_step: int | None = None
    thought: list[int] = field(default_factory=list)
    forced: int = 0
    blocks: int = 0
    answered: int = 0
    markers: int = 0
    boundaries: list[int] = field(default_factory=list)  # hashes at the boundaries of the loop rule
    repeats: int = 0
    patience: dict[str, int] = field(default_factory=dict)
    mean: Any = F32(0)
    var: Any = F32(0)
    seen: int = 0

    def __post_init__(self) -> None:
        phase, before = self.tokens.initial_phase(self.prompt)
        self.phase = phase.name.lower()
        self.used = before if self.config.count_prompt else 0
        self.budget = self.config.budget
        self.window = self.config.window
        self.soft = self.config.soft_bias
        if self.phase == "think":
            self.blocks = 1
        if self.phase == "answer":
            self.reason = "disabled"
        if self.budget == 0 and self.phase == "idle" and self.tokens.hybrid:
            self.phase, self.reason, self.exit_step = "force", "disabled", 0
            self.script = list(self.tokens.empty_block)

    @property
    def history(self) -> list[int]:
        return self.prompt + self.out

    def guard(self) -> tuple[set[int], float]:
        """Ids whose logit must be -inf before sampling, and what is added to that of the end marker."""
        hidden: set[int] = set()
        bias = 0.0
        if self.phase == "think":
            if self.used < self.config.min_tokens and self.config.min_action == "mask":
                hidden.add(self.tokens.end)
            if self.soft and self.budget:
                width = max(1, int(self.config.budget * 0.3)) if self.config.budget else 1
                ramp = (F32(self.used) - F32(self.config.budget - width)) / F32(width)  # type: ignore[operator]
                ramp = min(max(ramp, F32(0)), F32(1))
                kind = self.config.boundary
                here = self.at(kind) if kind not in ("none", "utf8") else not self.text.lacking(self.history)
                bias = float(F32(self.soft) * (ramp * ramp)) if here else 0.0
        if self.phase == "answer" and self.since is not None:
            if self.since < self.config.reclose_guard:
                hidden |= {self.tokens.start, self.tokens.end}
            if self.since < self.config.min_answer_tokens:
                hidden |= set(self.tokens.eos)
        return hidden, bias

    def at(self, kind: str) -> bool:
        return bool(self.history) and self.text.ends(self.history[-1], kind)

    def step(self, sampled: int, margin: float = 0.0, entropy: float = 0.0, probe: float = 0.0) -> int:
        if self.phase in ("off", "done"):
            return sampled
        token, eos = sampled, sampled in self.tokens.eos
        end, tool = sampled == self.tokens.end, sampled in self.tokens.implicit_ends(self.config)
        if self.phase in ("think", "grace"):
            why = self.why(margin, entropy, probe)
            if end:
                early = not why and self.used < self.config.min_tokens and self.config.min_action == "wait"
                token, end = (self.tokens.wait, False) if early else (token, True)
            elif tool:
                pass
            elif why:
                lacks = self.config.boundary != "none" and self.text.lacking(self.history)
                if lacks and self.waited < 3 and not eos:
                    self.phase, self.pending, self.waited = "grace", why, self.waited + 1
                else:
                    self.cut(why)
            elif eos and self.config.closes_on_eos:
                self.cut("eos")
        if self.phase == "force":
            token = self.script.pop(0)
            self.forced += 1
            self.phase = "force" if self.script else "answer"
            self.out.append(token)
            return token
        self.pass_on(token, end, tool, eos)
        return token

    def why(self, margin: float, entropy: float, probe: float) -> str:
        """Why the block must end now, or ""."""
        hits = []
        if self.phase == "think" and self.used >= max(1, self.config.min_tokens):
            hits = [name for rule in self.config.exits for name in self.rule(rule, margin, entropy, probe)]
            if self.window and self.budget and self.used >= self.budget - self.window and self.at(self.config.boundary):
                hits.append("window")
        if self.phase == "grace":
            return self.pending
        if self.manual:
            return "manual"
        if self.budget is not None and self.used >= self.budget:
            return "budget" if self.budget else "disabled"
        if self.config.reserve_answer and self.max_new is not None:
            length = len(self.stop_text())
            length += 3 if self.config.boundary != "none" else 0
            if len(self.out) + length + self.config.reserve_answer >= self.max_new:
                return "reserve"
        return next((name for name in ("window", "margin", "loop", "entropy", "probe") if name in hits), "")

    def rule(self, rule: Any, margin: float, entropy: float, probe: float) -> list[str]:
        if not self.at(rule.boundary):
            return []
        if isinstance(rule, LoopRule):
            return ["loop"] * (self.repeats >= rule.times)
        if isinstance(rule, EntropyRule):
            return ["entropy"] * self.settled(rule, F32(entropy))
        name = "margin" if isinstance(rule, MarginRule) else "probe"
        assert isinstance(rule, (MarginRule, ProbeRule))
        hit = F32(margin) <= F32(rule.tau) if name == "margin" else F32(probe) > F32(rule.tau)
        self.patience[name] = self.patience.get(name, 0) + 1 if hit else 0
        return [name] * (self.patience[name] >= rule.patience)

    def settled(self, rule: EntropyRule, x: Any) -> bool:
        a = F32(rule.alpha)
        if self.seen == 0:
            self.mean, self.var = x, F32(0)
        else:
            self.mean = a * x + (F32(1) - a) * self.mean
            off = x - self.mean
            self.var = a * (off * off) + (F32(1) - a) * self.var
        self.seen += 1
        return self.seen >= rule.after and bool(self.var < F32(rule.variance)) and bool(self.mean < F32(rule.mean))

    def stop_text(self) -> tuple[int, ...]:
        return self.tokens.text("stop_text", "short" if self.config.budget == 0 else self.config.stop_text)

    def cut(self, why: str) -> None:
        of_budget = why in ("budget", "disabled", "window", "reserve")
        name = ("short" if self.config.budget == 0 else self.config.stop_text) if of_budget else None
        name = self.config.exit_stop_text if name is None else name
        ids = list(self.tokens.text("text", name))
        if name == "short" and len(ids) > 1 and ids[0] in self.tokens.newlines and self.at("newline"):
            ids = ids[1:]
        self.script, self.phase, self.reason, self.exit_step = ids, "force", why, len(self.out)
        self.since, self.manual = 0, False

    def leave(self, why: str, phase: str) -> None:
        self.reason, self.exit_step, self.phase = why, len(self.out), phase
        self.manual, self.since = False, None

    def pass_on(self, token: int, end: bool, tool: bool, eos: bool) -> None:
        """A token that the model wrote and that stays."""
        if self.phase in ("think", "grace"):
            if end:
                self.markers += 1
                self.leave("natural", "answer")
            elif tool:
                self.answered += 1
                self.leave("tool", "answer")
            elif eos:
                self.markers += 1
                self.leave("eos", "done")
            else:
                self.used += 1
                self.thought.append(token)
                self.remember(token)
        elif token == self.tokens.start:
            self.phase, self.since = "think", None
            self.markers, self.blocks = self.markers + 1, self.blocks + 1
            self.used = 0 if self.config.scope == "block" else self.used
            self.waited = self.repeats = self.seen = 0
            self.patience.clear()
        else:
            self.answered += 1
            if self.phase == "answer" and self.since is not None:
                self.since += 1
            self.phase = "done" if eos else self.phase
        self.out.append(token)

    def remember(self, token: int) -> None:
        loop = next((rule for rule in self.config.exits if isinstance(rule, LoopRule)), None)
        if loop is None or not self.text.ends(token, loop.boundary):
            return
        last = self.thought[-16:][::-1]
        mark = sum(((t * 0x5BD1E995) % 2**31) * 4**age for age, t in enumerate(last)) % 2**31
        self.boundaries = [*self.boundaries, mark][-64:]
        self.repeats = self.boundaries.count(mark)

    def stats(self) -> ThinkingStats:
        return ThinkingStats(
            len(self.thought), self.forced, self.blocks, self.reason, self.exit_step, self.answered, self.markers
        )
