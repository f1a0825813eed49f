"""Streaming: whole characters only, the same text as the tokenizer's, and a greedy loop that ends where it should."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwenopt.cli import stream

TEXT = "naïve café, 日本語, 🙂👩‍👩‍👧, \U00010348, ß"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from qwenopt.cli import checkpoint

    return checkpoint.load_tokenizer(checkpoint.locate("dense"))


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    shown: list[str] = []
    out = stream.TextStream(tokenizer, shown.append)
    for token in ids:
        out.put(token)
    out.end()
    return shown


def test_characters_come_whole(tokenizer: Any) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) > len(TEXT)  # characters are spread over several tokens
    shown = pieces(tokenizer, ids)
    assert "".join(shown) == TEXT
    assert "\ufffd" not in "".join(shown)
    assert len(shown) > 10  # and nothing waits longer than it must


def test_a_character_cut_short_is_shown_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer("a🙂")["input_ids"][:-1]
    shown = pieces(tokenizer, ids)
    assert "".join(shown) == "a\ufffd"


def test_any_tokens_give_the_text_of_decode(tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(0, len(tokenizer), (40,), generator=generator).tolist()
        expected = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(pieces(tokenizer, ids)) == expected


def test_special_tokens_are_left_out_and_thinking_is_shown(tokenizer: Any) -> None:
    ids = tokenizer("<think>\nx\n</think>\n\nyes<|im_end|>")["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == "<think>\nx\n</think>\n\nyes"


def test_ids_without_a_token_give_nothing(tokenizer: Any) -> None:
    assert pieces(tokenizer, [len(tokenizer) + 5]) == []


class Cache:
    """Counts what it is asked for."""

    def __init__(self) -> None:
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1


def counting_model(input_ids: torch.Tensor, **_: Any) -> Any:
    """A model whose next token is the last one plus one."""
    return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids[:, -1:] + 1, 20).float())


def test_greedy_stops_at_a_stop_token_and_keeps_it() -> None:
    cache, seen = Cache(), []
    reply = stream.greedy(counting_model, cache, [1, 2, 3], 10, {6}, seen.append)
    assert reply.tokens == seen == [4, 5, 6]
    assert len(reply.seconds) == 3
    assert cache.resets == 1


def test_greedy_stops_at_the_limit() -> None:
    assert stream.greedy(counting_model, Cache(), [0], 2).tokens == [1, 2]


def test_speed_leaves_out_prompt_and_compilation() -> None:
    assert stream.Reply([1, 2, 3, 4], [9.0, 9.0, 0.5, 0.5]).tokens_per_second == 2.0
    assert stream.Reply([1, 2], [9.0, 9.0]).tokens_per_second == 0.0


def test_prompts_with_and_without_thinking(tokenizer: Any) -> None:
    thinking, direct = (tokenizer.decode(stream.prompt_ids(tokenizer, "Hi", mode)) for mode in (True, False))
    assert direct.startswith(thinking)
    assert direct.endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(("given", "config", "expected"), [(7, 1, {7}), ([7, 8], 1, {7, 8}), (None, 1, {1})])
def test_stop_ids(given: Any, config: Any, expected: set[int]) -> None:
    model: Any = SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=given), config=SimpleNamespace(eos_token_id=config)
    )
    assert stream.stop_ids(model) == expected
