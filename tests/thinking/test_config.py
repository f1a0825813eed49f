"""ThinkingConfig: what it takes, under whose names, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

import qwenopt
from qwenopt.runtime.sample import SamplingParams
from qwenopt.runtime.thinking import ThinkingConfig
from qwenopt.runtime.thinking_exits import EntropyRule, LoopRule, MarginRule, ProbeRule


def test_it_is_public() -> None:
    assert qwenopt.ThinkingConfig is ThinkingConfig
    assert qwenopt.ThinkingStats().reason == "none"


@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({"budget": 5}, 5),
        ({"budget": -1}, None),
        ({"budget": None}, None),
        ({"thinking_budget": 7}, 7),
        ({"thinking_token_budget": 0}, 0),
        ({"max_thinking_tokens": 9}, 9),
        ({"thinking_budget_tokens": -1}, None),
        ({"reasoning_budget_tokens": 3}, 3),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, 2000),
        ({"thinking": {"type": "disabled"}}, 0),
        ({"reasoning": {"max_tokens": 12}}, 12),
        ({"reasoning": {"effort": "low"}}, 1024),
        ({"reasoning": {"enabled": False}}, 0),
        ({"reasoning_effort": "high"}, 8192),
        ({"enable_thinking": False}, 0),
        ({"enable_thinking": True, "thinking_budget": 4}, 4),
        ({"thinking_budget": 4, "max_thinking_tokens": 4}, 4),
        ({}, None),
    ],
    ids=str,
)
def test_every_engines_name_is_one_field(fields: dict[str, Any], budget: int | None) -> None:
    assert ThinkingConfig.from_kwargs(**fields).budget == budget


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"thinking_budgett": 5}, r"no field 'thinking_budgett'; did you mean 'thinking_budget'\?"),
        ({"zzz": 5}, "no field 'zzz'; there are answer_sampling, boundary, budget"),
        ({"thinking_budget": 5, "max_thinking_tokens": 6}, "ask for different budgets; give one"),
        ({"enable_thinking": False, "budget": 6}, "ask for different budgets"),
        ({"budget": None, "thinking_budget": 6}, "ask for different budgets"),
        ({"budget": -2}, "budget -2; it must be an int of at least 1, 0 for no thinking"),
        ({"budget": True}, "budget True"),
        ({"budget": "512"}, "budget '512'"),
        ({"thinking_budget": 1.5}, "budget 1.5"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 100}},
            "budget_tokens 100; it must be an int of at least 1024",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_new_tokens": 2000}, "2000 of 2000 new tokens"),
        ({"thinking": {"type": "adaptive"}}, "it must be"),
        ({"thinking": {"type": "disabled", "budget_tokens": 5}}, "it must be"),
        (
            {"reasoning": {"max_tokens": 5, "exclude": True}},
            "it must have one of max_tokens, effort, enabled, and nothing",
        ),
        ({"reasoning": {"effort": "extreme"}}, "reasoning_effort 'extreme'; it must be one of none, minimal, low"),
        ({"enable_thinking": "yes"}, "enable_thinking 'yes'; it must be True or False"),
        ({"budget": 5, "scope": "turn"}, "scope 'turn'; it must be one of"),
        (
            {"budget": 5, "window": 3},
            "window 3 with boundary 'utf8'; a window looks for a boundary: set boundary to \"sent",
        ),
        ({"budget": 5, "window": 5, "boundary": "newline"}, "window 5 of a budget of 5; it must be smaller"),
        ({"window": 5, "boundary": "newline"}, "belong to a budget, but the budget is None"),
        ({"soft_bias": 5}, "belong to a budget"),
        ({"budget": 9, "soft_bias": -1}, "soft_bias -1; it must be a number of at least 0"),
        ({"budget": 9, "soft_bias": float("nan")}, "soft_bias nan"),
        ({"budget": 5, "min_tokens": 6}, "min_tokens 6 is more than the budget of 5"),
        ({"min_tokens": -1}, "min_tokens -1; it must be an int of at least 0"),
        ({"reserve_answer": True}, "reserve_answer True"),
        ({"stop_text": "stop"}, "it must be one of .*or hold </think> exactly once"),
        ({"stop_text": "</think></think>"}, "hold </think> exactly once"),
        ({"exit_stop_text": []}, "it must be text or a sequence of token ids"),
        ({"implicit_end_ids": (1, 2, 3, 4, 5)}, "they must be at most 4 ids"),
        ({"exits": ("margin",)}, "they must be different ones of"),
        ({"answer_sampling": {"temperature": 0}}, "it must be SamplingParams"),
        ({"count_prompt": 1}, "count_prompt 1"),
    ],
    ids=str,
)
def test_nothing_is_ignored(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ThinkingConfig.from_kwargs(**fields)


def test_what_a_thinking_argument_may_be() -> None:
    config = ThinkingConfig(3)
    assert ThinkingConfig.of(config) is config
    assert ThinkingConfig.of(None).budget is None
    assert ThinkingConfig.of(12).budget == 12
    assert ThinkingConfig.of({"thinking_budget": 5, "boundary": "none"}) == ThinkingConfig(5, boundary="none")
    assert ThinkingConfig.of({"type": "enabled", "budget_tokens": 1024}).budget == 1024
    for wrong in (True, "high", 1.0):
        with pytest.raises(ValueError, match="budget"):
            ThinkingConfig.of(wrong)


def test_one_for_all_rows_or_one_each() -> None:
    assert [c.budget for c in ThinkingConfig.for_rows(5, 3)] == [5, 5, 5]
    assert [c.budget for c in ThinkingConfig.for_rows([5, None, {"budget": 0}], 3)] == [5, None, 0]
    with pytest.raises(ValueError, match="thinking: 2 values for 3 rows; give one for each, or one for all"):
        ThinkingConfig.for_rows([5, 6], 3)


def test_a_servers_limit_caps_a_requests_wish() -> None:
    assert ThinkingConfig().capped(100).budget == 100
    assert ThinkingConfig(50).capped(100).budget == 50
    assert ThinkingConfig(500).capped(None).budget == 500
    capped = ThinkingConfig(500, boundary="sentence", window=60, min_tokens=400, soft_bias=2.0).capped(50)
    assert (capped.budget, capped.window, capped.min_tokens) == (50, 0, 50)
    assert ThinkingConfig(500, min_tokens=9, soft_bias=1.0).capped(0) == ThinkingConfig(0)


def test_the_end_of_text_closes_where_thinking_is_limited() -> None:
    assert not ThinkingConfig().closes_on_eos
    assert ThinkingConfig(5).closes_on_eos
    assert ThinkingConfig(exits=(LoopRule(),)).closes_on_eos
    assert not ThinkingConfig(5, on_eos="stop").closes_on_eos
    assert ThinkingConfig(on_eos="close").closes_on_eos


@pytest.mark.parametrize(
    "config",
    [
        ThinkingConfig(),
        ThinkingConfig(0),
        ThinkingConfig(512, stop_text=[1, 2, 3], implicit_end_ids=(4,), boundary="sentence", window=9),
        ThinkingConfig(exits=(MarginRule(0.1, 2), LoopRule(5, "any"), EntropyRule(), ProbeRule(0.8))),
        ThinkingConfig(5, answer_sampling=SamplingParams(0.0, seed=3)),
    ],
    ids=str,
)
def test_it_survives_json(config: ThinkingConfig) -> None:
    assert ThinkingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_rule_of_a_file_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"exit rule 'vote'; it must be one of \['entropy', 'loop', 'margin', 'probe'\]"
    ):
        ThinkingConfig.from_dict({"exits": [{"rule": "vote"}]})


def test_rules_may_be_dicts_wherever_a_config_may_be_one() -> None:
    rule = {"rule": "margin", "tau": 0.1, "patience": 2, "boundary": "any"}
    wanted = ThinkingConfig(budget=9, exits=(MarginRule(0.1, 2, "any"),))
    assert ThinkingConfig.of({"budget": 9, "exits": [rule]}) == wanted
    assert ThinkingConfig.from_kwargs(budget=9, exits=(rule,)) == wanted
    with pytest.raises(ValueError, match="vote"):
        ThinkingConfig.of({"exits": [{"rule": "vote"}]})
