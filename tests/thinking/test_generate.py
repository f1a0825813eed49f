"""qwenopt.generate under thinking control: what only its loop can show."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qwenopt
from qwenopt import native
from qwenopt.demo.load import demo_model
from qwenopt.demo.task import unseen_questions
from qwenopt.runtime.thinking_exits import EntropyRule, MarginRule
from qwenopt.testing.releases import ELEMENTWISE_ROTARY, TRANSFORMERS
from qwenopt.testing.thinking_oracle import Oracle, Text

NEW = 60


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 20, "seed": 5}], ids=str)
def test_t07_t14_t23_every_reply_is_the_oracles(tokens: Any, text: Text, sampling: dict[str, Any]) -> None:
    """Mixed configurations, more prompts than a batch has lines, texts that max_new_tokens cuts off."""
    model, tokenizer = demo_model("dense", torch.float32)
    prompts = []
    for question in unseen_questions(6):
        chat = [{"role": "user", "content": question.text}]
        chatted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompts.append(list(tokenizer.encode(chatted, add_special_tokens=False)))
    configs = [
        qwenopt.ThinkingConfig(12),
        qwenopt.ThinkingConfig(0),
        qwenopt.ThinkingConfig(),
        qwenopt.ThinkingConfig(40),  # its text does not fit
        qwenopt.ThinkingConfig(20, boundary="newline", window=15),
        qwenopt.ThinkingConfig(reserve_answer=10),
    ]
    out = qwenopt.generate(
        model, prompts, max_new_tokens=NEW, thinking=configs, tokenizer=tokenizer, eos_token_id=tokens.eos, **sampling
    )
    for config, prompt, ids, stats in zip(configs, prompts, out.replies, out.thinking, strict=True):
        # The text begins with no marker, so that a forced token is known from the model's own.
        oracle = Oracle(config, tokens, text, prompt, NEW)
        assert [oracle.step(token) for token in ids] == ids
        assert stats == oracle.stats()
        assert stats.generated_tokens == len(ids)
    reasons = [stats.reason for stats in out.thinking]
    assert reasons[:2] == ["budget", "disabled"]
    assert len(out.replies[3]) == NEW
    assert reasons[5] in ("reserve", "natural")


@pytest.mark.skipif(not native.available(), reason=f"a step is one native call: {native.why_not()}")
@pytest.mark.parametrize("rule", [None, MarginRule(1.0), EntropyRule()], ids=lambda rule: type(rule).__name__)
def test_the_tail_of_a_greedy_step_is_part_of_its_plan(tokens: Any, rule: Any) -> None:
    """Nothing behind the rotary tables is left to Python: no logits leave the plan, whatever is controlled."""
    model, tokenizer = demo_model("dense", torch.bfloat16)
    config = qwenopt.ThinkingConfig(9, exits=() if rule is None else (rule,))
    qwenopt.generate(
        model, [[tokens.start], [tokens.start, 5]], max_new_tokens=4, thinking=config, tokenizer=tokenizer,
        eos_token_id=tokens.eos, temperature=0.0,
    )  # fmt: skip
    decode = qwenopt.last_report().graphs[-1]
    assert {"budget_guard", "top_tokens", "budget_step"} <= set(decode.counts)
    assert decode.counts.get("logit_signals", 0) == (rule is not None)
    tables = {"no step for float"}
    if TRANSFORMERS < ELEMENTWISE_ROTARY:
        tables |= {"no step for expand", "cat of other tensors than cached and new keys"}
    assert set(decode.plan_breaks) <= {"no step for embedding", *tables}
    assert len(decode.plan_steps) == 1
