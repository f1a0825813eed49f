"""T2 and T1 by qwenopt.generate itself: the recipe of Qwen's documentation, and ten thousand budgets that hold."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

import qwenopt
from qwenopt.demo.load import demo_model
from qwenopt.demo.task import unseen_questions
from qwenopt.runtime.paged_cache import PagedKVCache

STEPS = 160
GENERATIONS, AT_ONCE, LARGEST = 10_000, 64, 48
SLACK = 3  # tokens that a character may lack when the budget is spent


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    chats = [[{"role": "user", "content": question.text}] for question in unseen_questions(count)]
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    return [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]


@torch.no_grad()
def two_pass(model: Any, tokens: Any, prompt: list[int], budget: int) -> list[int]:
    """The recipe of Qwen's documentation, with transformers alone."""

    def greedy(ids: list[int], count: int) -> list[int]:
        given = torch.tensor([ids])
        kwargs = {"max_new_tokens": count, "do_sample": False, "eos_token_id": list(tokens.eos)}
        return model.generate(given, attention_mask=torch.ones_like(given), **kwargs)[0, len(ids) :].tolist()

    first = greedy(prompt, budget)
    if not set(first) & set(tokens.eos) and tokens.end not in first:
        first += tokens.texts["qwen3"]
    left = STEPS - len(first)
    return first + (greedy(prompt + first, left) if left > 0 and not set(first) & set(tokens.eos) else [])


@pytest.mark.slow
@pytest.mark.parametrize("opened", [False, True], ids=["hybrid", "opened"])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_t02_one_pass_is_the_two_pass_recipe(name: str, opened: bool, tokens: Any, tokenizer: Any) -> None:
    """All budgets in one batch of the compiled loop, float32, greedy. The recipe counts a marker that the model writes
    itself, and guards nothing.
    """
    model = demo_model(name, torch.float32)[0]
    tail = [tokens.start, *tokenizer.encode("\n", add_special_tokens=False)] if opened else []
    cases = [(prompt + tail, budget) for prompt in prompts(tokenizer, 8)[4:] for budget in (1, 12, 40, 64, 100)]
    guards: dict[str, Any] = {"reclose_guard": 0, "min_answer_tokens": 0}
    configs = [qwenopt.ThinkingConfig(n, boundary="none", on_eos="stop", **guards) for _, n in cases]
    out = qwenopt.generate(
        model, [prompt for prompt, _ in cases], max_new_tokens=STEPS, thinking=configs, tokenizer=tokenizer,
        eos_token_id=tokens.eos, temperature=0.0,
    )  # fmt: skip
    for (prompt, budget), mine in zip(cases, out.replies, strict=True):
        assert mine == two_pass(model, tokens, prompt, budget if opened else budget + 1)
    reasons = Counter(stats.reason for stats in out.thinking)
    assert set(reasons) == {"budget", "natural"}


@pytest.mark.slow
def test_t01_ten_thousand_budgets_hold(tokens: Any, tokenizer: Any) -> None:
    """Random budgets and boundaries, each reply sampled; hot, so that characters are begun that a cut would break.

    Counted from the ids, not by the state's own word: what stands between the marker and the closing text.
    """
    model, rng = demo_model("dense", torch.float32)[0], random.Random(0)
    asked, closing = prompts(tokenizer, 200), tokens.texts["qwen3"]
    new = LARGEST + SLACK + len(closing)
    room = -(-(max(map(len, asked)) + 1 + new) // 32)
    cache = PagedKVCache(
        model.config, max_batch_size=AT_ONCE, num_pages=room * AT_ONCE, page_size=32, dtype=model.dtype,
        max_length=room * 32,
    )  # fmt: skip
    over: Counter[int] = Counter()
    for seed, temperature in enumerate((0.6, 3.0)):
        count = GENERATIONS // 2
        budgets = [rng.randint(1, LARGEST) for _ in range(count)]
        bounds = [rng.choice(["none", "utf8", "sentence", "newline", "paragraph"]) for _ in budgets]
        configs = [qwenopt.ThinkingConfig(n, boundary=b) for n, b in zip(budgets, bounds, strict=True)]
        out = qwenopt.generate(
            model, [asked[i % len(asked)] + [tokens.start] for i in range(count)], max_new_tokens=new,
            thinking=configs, tokenizer=tokens, cache=cache, seed=seed, temperature=temperature, top_k=0, top_p=1.0,
        )  # fmt: skip
        for budget, bound, reply, stats in zip(budgets, bounds, out.replies, out.thinking, strict=True):
            end = min(reply.index(i) for i in (tokens.end, tokens.tool) if i in reply)  # a tool call ends it as well
            text = closing.index(tokens.end) if stats.reason == "budget" else 0  # what of it is before its marker
            extra = end - text - budget
            assert extra <= (0 if bound == "none" else SLACK), (budget, bound, stats)
            over[max(extra, 0)] += 1
    assert sum(over.values()) == GENERATIONS
    assert over[0] < GENERATIONS  # the hot half has met unfinished characters
