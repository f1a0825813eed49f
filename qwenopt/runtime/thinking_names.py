"""The names that other engines have for a thinking budget, made one; nothing that was asked for is ignored."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

# Qwen, SGLang and FastDeploy; vLLM, TensorRT-LLM and Dynamo; SGLang and NIM; llama.cpp twice.
BUDGET_NAMES = (
    "thinking_budget",
    "thinking_token_budget",
    "max_thinking_tokens",
    "thinking_budget_tokens",
    "reasoning_budget_tokens",
)
EFFORTS: dict[str, int] = {"none": 0, "minimal": 512, "low": 1024, "medium": 2048, "high": 8192}
LEAST_ANTHROPIC = 1024


def normalise(given: Mapping[str, Any], known: set[str], max_new_tokens: int | None = None) -> dict[str, Any]:
    """`given` under the names of ThinkingConfig's fields (`known`).

    Raises ValueError for a name that is none of these, for two that ask for different budgets, and for parts of
    `thinking={...}` and `reasoning={...}` that cannot be enforced.
    """
    fields = {name: value for name, value in given.items() if name in known}
    budgets = {name: value for name, value in given.items() if name in BUDGET_NAMES}
    others = {"thinking": _anthropic, "reasoning": _openrouter, "reasoning_effort": _effort, "enable_thinking": _switch}
    for name, value in given.items():
        if name in others:
            budgets[name] = others[name](value, max_new_tokens)
        elif name not in known and name not in BUDGET_NAMES:
            names = [*known, *BUDGET_NAMES, *others]
            nearest = get_close_matches(name, names, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(sorted(names))}"
            raise ValueError(f"ThinkingConfig: there is no field {name!r}; {hint}")
    if "budget" in fields:
        budgets["budget"] = fields["budget"]
    # enable_thinking=True sets no budget of its own.
    wishes = {name: value for name, value in budgets.items() if not (name == "enable_thinking" and value is None)}
    values = {-1 if value is None else value for value in wishes.values()}
    if len(values) > 1:
        raise ValueError(f"ThinkingConfig: {wishes} ask for different budgets; give one")
    if wishes:
        fields["budget"] = next(iter(wishes.values()))
    return fields


def _anthropic(value: Any, max_new_tokens: int | None) -> Any:
    """`thinking={"type": "enabled", "budget_tokens": n}`, with Anthropic's own limits; or "disabled"."""
    allowed = {"enabled": {"type", "budget_tokens"}, "disabled": {"type"}}
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind not in allowed or not set(value) <= allowed[kind]:
        raise ValueError(
            f'thinking={value!r}; it must be {{"type": "enabled", "budget_tokens": n}} or {{"type": "disabled"}}'
        )
    if kind == "disabled":
        return 0
    budget = value.get("budget_tokens")
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < LEAST_ANTHROPIC:
        raise ValueError(f"thinking: budget_tokens {budget!r}; it must be an int of at least {LEAST_ANTHROPIC}")
    if max_new_tokens is not None and budget >= max_new_tokens:
        raise ValueError(f"thinking: budget_tokens {budget} of {max_new_tokens} new tokens; it must be less")
    return budget


def _openrouter(value: Any, max_new_tokens: int | None) -> Any:
    """`reasoning={"max_tokens": n}` or `{"effort": "low"}` or `{"enabled": false}`."""
    if not isinstance(value, Mapping) or len(value) != 1 or not set(value) <= {"max_tokens", "effort", "enabled"}:
        raise ValueError(f"reasoning={value!r}; it must have one of max_tokens, effort, enabled, and nothing else")
    ((key, inner),) = value.items()
    if key == "effort":
        return _effort(inner, max_new_tokens)
    return _switch(inner, max_new_tokens) if key == "enabled" else inner


def _effort(value: Any, max_new_tokens: int | None) -> int:
    if value not in EFFORTS:
        raise ValueError(f"reasoning_effort {value!r}; it must be one of {', '.join(EFFORTS)}")
    return EFFORTS[value]


def _switch(value: Any, max_new_tokens: int | None) -> int | None:
    if not isinstance(value, bool):
        raise ValueError(f"enable_thinking {value!r}; it must be True or False")
    return None if value else 0
