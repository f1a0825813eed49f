"""What may be asked of a row's thinking, and what is told about it afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qwenopt.ops.budget_state import MAX_IMPLICIT
from qwenopt.runtime.sample import SamplingParams
from qwenopt.runtime.thinking_exits import EXIT_RULES, ExitRule, exit_from_dict

Boundary = Literal["none", "utf8", "sentence", "newline", "paragraph"]
Scope = Literal["request", "block"]
NAMED_TEXTS = ("qwen3", "report", "short", "bare")


@dataclass(frozen=True)
class ThinkingConfig:
    """How long a row may think, and how its thinking ends.

    budget: at most so many generated tokens between `<think>` and the closing text; None or -1 is unlimited, 0 is no
        thinking. `scope` "request" counts all blocks together, "block" each anew.
    stop_text: what is written when the budget, its window or the answer's reserve ends a block: "qwen3" (the sentence
        of Qwen's documentation, 24 tokens), "report" (that of the technical report), "short", "bare", other text with
        one `</think>`, or ids. exit_stop_text: the same for every other end, where "limited time" would be untrue.
    boundary: where a block may be cut. Anything but "none" never cuts a character, which may take up to 3 tokens more;
        with "sentence", "newline" or "paragraph", the first one among the last `window` tokens of the budget ends it.
    soft_bias: added to the logit of `</think>` at boundaries, growing with the square over the last 30 % of the budget.
    min_tokens: before so many, `</think>` is masked ("mask") or replaced by " wait" ("wait").
    reserve_answer: tokens of `max_new_tokens` that thinking leaves to the answer.
    on_eos: the end of the text inside a block ends the text ("stop") or the block ("close"); "auto" closes when a
        budget or an exit rule is set.
    implicit_end_ids: ids that end a block without its marker; None is `<tool_call>`, where the tokenizer has it.
    reclose_guard: answer tokens after a forced end in which neither marker may be written; min_answer_tokens: those
        before the text may end.
    exits: rules that end a block early, see `thinking_exits`; none by default.
    count_prompt: thinking that the prompt already holds counts against the budget.
    answer_sampling: how the answer is sampled, where it differs.
    """

    budget: int | None = None
    scope: Scope = "request"
    stop_text: str | Sequence[int] = "qwen3"
    exit_stop_text: str | Sequence[int] = "short"
    boundary: Boundary = "utf8"
    window: int = 0
    soft_bias: float = 0.0
    min_tokens: int = 0
    min_action: Literal["mask", "wait"] = "mask"
    reserve_answer: int = 0
    on_eos: Literal["auto", "close", "stop"] = "auto"
    implicit_end_ids: tuple[int, ...] | None = None
    reclose_guard: int = 8
    min_answer_tokens: int = 1
    exits: tuple[ExitRule, ...] = ()
    count_prompt: bool = True
    answer_sampling: SamplingParams | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", check_budget(self.budget))
        for name, values in (
            ("scope", get_args(Scope)),
            ("boundary", get_args(Boundary)),
            ("min_action", ("mask", "wait")),
            ("on_eos", ("auto", "close", "stop")),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"ThinkingConfig: {name} {getattr(self, name)!r}; it must be one of {values}")
        for name in ("window", "min_tokens", "reserve_answer", "reclose_guard", "min_answer_tokens"):
            _whole(name, getattr(self, name))
        if isinstance(self.soft_bias, bool) or not isinstance(self.soft_bias, (int, float)) or not self.soft_bias >= 0:
            raise ValueError(f"ThinkingConfig: soft_bias {self.soft_bias!r}; it must be a number of at least 0")
        if not isinstance(self.count_prompt, bool):
            raise ValueError(f"ThinkingConfig: count_prompt {self.count_prompt!r}; it must be True or False")
        for name in ("stop_text", "exit_stop_text"):
            object.__setattr__(self, name, _text(name, getattr(self, name)))
        self._check_together()

    def _check_together(self) -> None:
        """What each field alone does not show."""
        budget = self.budget
        if self.window and self.boundary in ("none", "utf8"):
            raise ValueError(
                f"ThinkingConfig: window {self.window} with boundary {self.boundary!r}; a window looks for a boundary: "
                'set boundary to "sentence", "newline" or "paragraph"'
            )
        if (self.window or self.soft_bias) and not budget:
            raise ValueError(f"ThinkingConfig: window and soft_bias belong to a budget, but the budget is {budget}")
        if budget and self.window >= budget:
            raise ValueError(f"ThinkingConfig: window {self.window} of a budget of {budget}; it must be smaller")
        if budget is not None and self.min_tokens > budget - self.window:
            raise ValueError(
                f"ThinkingConfig: min_tokens {self.min_tokens} is more than the budget of {budget} (less its window "
                f"of {self.window}) allows"
            )
        if self.implicit_end_ids is not None:
            ids = tuple(self.implicit_end_ids)
            if len(ids) > MAX_IMPLICIT or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
                raise ValueError(f"ThinkingConfig: implicit_end_ids {ids}; they must be at most {MAX_IMPLICIT} ids")
            object.__setattr__(self, "implicit_end_ids", ids)
        object.__setattr__(self, "exits", tuple(self.exits))
        kinds = [type(rule) for rule in self.exits]
        if any(kind not in EXIT_RULES.values() for kind in kinds) or len(set(kinds)) < len(kinds):
            raise ValueError(f"ThinkingConfig: exits {self.exits}; they must be different ones of {sorted(EXIT_RULES)}")
        if self.answer_sampling is not None and not isinstance(self.answer_sampling, SamplingParams):
            raise ValueError(f"ThinkingConfig: answer_sampling {self.answer_sampling!r}; it must be SamplingParams")

    @property
    def closes_on_eos(self) -> bool:
        """Whether the end of the text inside a block closes the block instead."""
        return self.on_eos == "close" or (self.on_eos == "auto" and (self.budget is not None or bool(self.exits)))

    def capped(self, ceiling: int | None) -> ThinkingConfig:
        """The same with a budget of at most `ceiling`: a server's limit over a request's wish."""
        limit = check_budget(ceiling)
        if limit is None or (self.budget is not None and self.budget <= limit):
            return self
        window = self.window if self.window < limit else 0
        least = min(self.min_tokens, limit - window)
        bias = self.soft_bias if limit else 0.0
        return dataclasses.replace(self, budget=limit, window=window, min_tokens=least, soft_bias=bias)

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, in values that JSON has; `from_dict` reads it."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name == "exits":
                value = [rule.to_dict() for rule in value]
            elif field.name == "answer_sampling":
                value = dataclasses.asdict(value)
            out[field.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ThinkingConfig:
        """The inverse of `to_dict`; an unknown key raises."""
        fields = dict(values)
        if isinstance(fields.get("answer_sampling"), Mapping):
            fields["answer_sampling"] = SamplingParams(**fields["answer_sampling"])
        return cls.from_kwargs(**fields)

    @classmethod
    def from_kwargs(cls, *, max_new_tokens: int | None = None, **fields: Any) -> ThinkingConfig:
        """From the fields, or under the names that other engines have for them (`thinking_names`).

        Exit rules may be dicts. Unknown names, and what cannot be enforced, raise ValueError; nothing is
        ignored.
        """
        from qwenopt.runtime.thinking_names import normalise

        if isinstance(fields.get("exits"), (list, tuple)):
            rules = fields["exits"]
            fields["exits"] = tuple(exit_from_dict(rule) if isinstance(rule, Mapping) else rule for rule in rules)
        if isinstance(fields.get("implicit_end_ids"), list):
            fields["implicit_end_ids"] = tuple(fields["implicit_end_ids"])
        return cls(**normalise(fields, {f.name for f in dataclasses.fields(cls)}, max_new_tokens))

    @classmethod
    def of(cls, value: Any, max_new_tokens: int | None = None) -> ThinkingConfig:
        """From what a `thinking=` argument may be: a config, a budget, a dict of names as `from_kwargs` takes, None."""
        if isinstance(value, ThinkingConfig):
            return value
        if isinstance(value, Mapping):
            keys = {"thinking": dict(value)} if "type" in value else dict(value)
            return cls.from_kwargs(max_new_tokens=max_new_tokens, **keys)
        return cls(budget=value)

    @classmethod
    def for_rows(cls, value: Any, rows: int, max_new_tokens: int | None = None) -> list[ThinkingConfig]:
        """One config a row: from a list of one value each, or the same for all."""
        values = list(value) if isinstance(value, (list, tuple)) else [value] * rows
        if len(values) != rows:
            raise ValueError(f"thinking: {len(values)} values for {rows} rows; give one for each, or one for all")
        return [cls.of(one, max_new_tokens) for one in values]


def check_budget(budget: Any) -> int | None:
    """A budget as it is kept: None is unlimited."""
    if budget is None:
        return None
    if isinstance(budget, bool) or not isinstance(budget, int) or not -1 <= budget < 1 << 30:
        raise ValueError(
            f"ThinkingConfig: budget {budget!r}; it must be an int of at least 1, 0 for no thinking, or None or -1 for "
            "no limit"
        )
    return None if budget == -1 else budget


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 30:
        raise ValueError(f"ThinkingConfig: {name} {value!r}; it must be an int of at least 0")


def _text(name: str, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        if value not in NAMED_TEXTS and value.count("</think>") != 1:
            raise ValueError(
                f"ThinkingConfig: {name} {value!r}; it must be one of {NAMED_TEXTS}, or hold </think> exactly once"
            )
        return value
    ids = tuple(value) if isinstance(value, Sequence) else ()
    if not ids or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise ValueError(f"ThinkingConfig: {name} {value!r}; it must be text or a sequence of token ids")
    return ids


@dataclass(frozen=True)
class ThinkingStats:
    """What a row's thinking came to, in generated tokens.

    tokens: thought, in all blocks. forced_tokens: written by the closing texts. blocks: begun, one that the prompt
    opened included. reason: why the last block ended: none, natural, tool, eos, disabled, manual, budget, reserve,
    window, margin, loop, entropy or probe. exit_step: the place in the output where that began, or None.
    answer_tokens: everything outside blocks. marker_tokens: markers that the model wrote itself.
    """

    tokens: int = 0
    forced_tokens: int = 0
    blocks: int = 0
    reason: str = "none"
    exit_step: int | None = None
    answer_tokens: int = 0
    marker_tokens: int = 0

    @property
    def generated_tokens(self) -> int:
        """All tokens of the output."""
        return self.tokens + self.forced_tokens + self.answer_tokens + self.marker_tokens

    @property
    def reasoning_tokens(self) -> int:
        """All but the answer: `completion_tokens_details.reasoning_tokens` of the usual usage report."""
        return self.generated_tokens - self.answer_tokens
