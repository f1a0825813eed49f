"""The demo tokenizer, which has Qwen's markers and all bytes, seen by thinking control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from qwenopt.runtime.thinking_state import ThinkingState
from qwenopt.runtime.thinking_tokens import ThinkingTokens, encode, token_bytes
from qwenopt.testing.scripted import Played, ScriptedLM, play
from qwenopt.testing.thinking_oracle import Text
from qwenopt.testing.thinking_streams import demo_vocabulary


@pytest.fixture(scope="session")
def vocabulary() -> tuple[Any, ThinkingTokens]:
    return demo_vocabulary()


@pytest.fixture(scope="session")
def tokenizer(vocabulary: tuple[Any, ThinkingTokens]) -> Any:
    return vocabulary[0]


@pytest.fixture(scope="session")
def tokens(vocabulary: tuple[Any, ThinkingTokens]) -> ThinkingTokens:
    return vocabulary[1]


@pytest.fixture(scope="session")
def text(tokenizer: Any) -> Text:
    return Text(token_bytes(tokenizer), frozenset(int(i) for i in tokenizer.added_tokens_decoder))


@pytest.fixture(scope="session")
def qwen() -> ThinkingTokens:
    """The real vocabulary."""
    from qwenopt.testing.qwen_vocab import qwen3_tokenizer

    eos = [151645, 151643]
    return ThinkingTokens.of(qwen3_tokenizer(), vocab_size=151936, eos_token_id=eos)


@pytest.fixture(params=["eager", "fullgraph"])
def wrap(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """Runs the tail of the step as it stands, or as one graph that may not be compiled a second time."""
    if request.param == "eager":
        return lambda tail: tail

    def once(tail: Any) -> Any:
        compiled = torch.compile(tail, backend="eager", fullgraph=True)

        def call(*args: Any) -> Any:
            with torch._dynamo.config.patch(error_on_recompile=True):
                return compiled(*args)

        return call

    return once


@pytest.fixture
def run(tokens: ThinkingTokens, wrap: Callable[[Any], Any]) -> Callable[..., Played]:
    """`run([(config, prompt, script), ...], steps, ...)` -> what came of it; see `qwenopt.testing.scripted.play`."""

    def run(rows: Sequence[tuple[Any, Sequence[int], Sequence[int]]], steps: int, **given: Any) -> Played:
        make = {name: given.pop(name) for name in ("signals", "probe", "max_forced") if name in given}
        configs, prompts, scripts = zip(*rows, strict=True)
        state = given.pop("state", None) or ThinkingState(len(rows), given.pop("tokens", tokens), **make)
        return play(state, configs, prompts, ScriptedLM(scripts, len(state.lut)), steps, wrap=wrap, **given)

    return run


@dataclass(frozen=True)
class Words:
    """Ids of the demo vocabulary that scripts are written in."""

    start: int
    end: int
    eos: int
    tool: int
    hybrid: list[int]  # a prompt that leaves the first marker to the model
    opened: list[int]  # a prompt that ends in `<think>` and a newline
    newline: int
    paragraph: list[int]
    stop: int  # the end of a sentence
    han: list[int]  # three bytes of one character
    x: int
    y: int


@pytest.fixture(scope="session")
def words(tokenizer: Any, tokens: ThinkingTokens) -> Words:
    chat = [{"role": "user", "content": "What is 2 + 3?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt = list(encode(tokenizer, text))
    (newline,) = encode(tokenizer, "\n")
    han = list(encode(tokenizer, "好"))
    assert len(han) == 3
    (x,), (y,), (stop,) = encode(tokenizer, "x"), encode(tokenizer, "y"), encode(tokenizer, ".")
    assert tokens.tool is not None
    opened = [*prompt, tokens.start, newline]
    return Words(
        tokens.start, tokens.end, tokens.eos[0], tokens.tool, prompt, opened, newline,
        list(encode(tokenizer, "\n\n")), stop, han, x, y,
    )  # fmt: skip
