"""qwenopt.generate under thinking control: what only its loop can show."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qwenopt
from qwenopt.demo.load import demo_model
from qwenopt.demo.task import unseen_questions
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
