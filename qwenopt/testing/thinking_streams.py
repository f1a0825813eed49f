"""Random configurations of thinking control and random streams of tokens, over the demo vocabulary."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, get_args

from qwenopt.demo.load import demo_path
from qwenopt.runtime.thinking import Boundary, ThinkingConfig
from qwenopt.runtime.thinking_exits import EntropyRule, ExitRule, LoopRule, MarginRule, ProbeRule
from qwenopt.runtime.thinking_tokens import ThinkingTokens, encode


def demo_vocabulary() -> tuple[Any, ThinkingTokens]:
    """The demo tokenizer, which has Qwen's markers and all bytes, and what thinking control knows of it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_path("dense"), local_files_only=True)
    eos = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    return tokenizer, ThinkingTokens.of(tokenizer, vocab_size=512, eos_token_id=eos)


def random_config(rng: random.Random) -> ThinkingConfig:
    budget = rng.choice([None, 0, 1, 2, 5, 9, 20, 40])
    boundary: Boundary = rng.choice(get_args(Boundary))
    window = rng.randrange(budget) if budget and boundary not in ("none", "utf8") else 0
    room = (budget or 12) - window if budget != 0 else 0
    exits: list[ExitRule] = [
        MarginRule(rng.choice([0.1, 0.5]), rng.choice([1, 2]), rng.choice(["any", "sentence"])),
        LoopRule(rng.choice([2, 3]), rng.choice(["any", "newline"])),
        EntropyRule(0.6, 0.08, 0.9, rng.choice(["any", "sentence"])),
        ProbeRule(0.6, rng.choice([1, 3]), rng.choice(["any", "sentence"])),
    ]
    return ThinkingConfig(
        budget=budget,
        scope=rng.choice(["request", "block"]),
        stop_text=rng.choice(["qwen3", "report", "short", "bare", "\n\nEnough.</think> So: "]),
        exit_stop_text=rng.choice(["short", "bare"]),
        boundary=boundary,
        window=window,
        soft_bias=rng.choice([0.0, 3.0]) if budget else 0.0,
        min_tokens=rng.choice([0, 0, min(6, room)]),
        min_action=rng.choice(["mask", "wait"]),
        reserve_answer=rng.choice([0, 0, 10, 40]),
        on_eos=rng.choice(["auto", "close", "stop"]),
        implicit_end_ids=rng.choice([None, (), (70, 71)]),
        reclose_guard=rng.choice([0, 3, 8]),
        min_answer_tokens=rng.choice([0, 1, 4]),
        exits=tuple(rule for rule in exits if rng.random() < 0.3),
        count_prompt=rng.random() < 0.7,
    )


class Streams:
    """Tokens that make things happen: markers, ends, half characters, boundaries, and now and then a loop."""

    def __init__(self, tokens: ThinkingTokens, tokenizer: Any) -> None:
        self.markers = [tokens.start, tokens.end, *tokens.eos, *([] if tokens.tool is None else [tokens.tool]), 70]
        half = [piece for c in "你好🙂é" for piece in encode(tokenizer, c)]
        self.plain = [*half, *half, *encode(tokenizer, "\n"), *encode(tokenizer, "."), *encode(tokenizer, "a b c!?")]
        self.tokens = tokens

    def prompt(self, rng: random.Random) -> list[int]:
        t = self.tokens
        assert t.turn is not None
        turn = [t.turn, 5, 6, *t.eos[:1], t.turn, 7]
        newline = sorted(t.newlines)[0]
        old = [t.start, 5, t.end] if rng.random() < 0.3 else []
        now = rng.choice([[], [], [t.start, newline], [t.start], [t.start, newline, 40, 41], [t.start, 9, t.end, 9]])
        return [*old, *turn, *now]

    def stream(self, rng: random.Random) -> Iterator[int]:
        yield rng.choice([self.tokens.start, self.tokens.start, self.plain[0]])
        loop = [rng.choice(self.plain) for _ in range(rng.choice([1, 2, 5]))]
        while True:
            if rng.random() < 0.15:
                yield from loop * (30 // len(loop))
            yield rng.choice(self.markers) if rng.random() < 0.06 else rng.choice(self.plain)
