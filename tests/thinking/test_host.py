"""T22..T24, T27: what the host may do while rows run, what it is told, and what it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from qwenopt.runtime.thinking import ThinkingConfig
from qwenopt.runtime.thinking_state import ThinkingState
from qwenopt.runtime.thinking_stream import ThinkingStream
from qwenopt.runtime.thinking_tokens import ThinkingTokens


def test_t22_manual_end_and_budget_change(run: Any, words: Any, tokens: Any) -> None:
    state = ThinkingState(3, tokens)

    def before(step: int) -> None:
        if step == 6:
            state.end_now(0)
            state.set_budget(1, 3)
            state.set_budget(2, None)

    configs = [ThinkingConfig(), ThinkingConfig(50, stop_text="bare"), ThinkingConfig(8)]
    done = run([(c, words.opened, [words.x] * 40) for c in configs], 20, state=state, before=before)
    short = list(tokens.texts["short"])
    assert done.ids[0] == [*[words.x] * 6, *short, *[words.x] * 20][:20]
    assert done.ids[1].index(words.end) == 6
    assert done.ids[2] == [words.x] * 20
    assert [s.reason for s in done.stats] == ["manual", "budget", "none"]


def test_t22_manual_end_outside_a_block_waits_for_one(run: Any, words: Any, tokens: Any) -> None:
    state = ThinkingState(1, tokens)
    script = [words.y, words.y, words.start, *[words.x] * 9]
    call = lambda step: state.end_now(0) if step == 1 else None  # noqa: E731
    done = run([(ThinkingConfig(exit_stop_text="bare"), words.hybrid, script)], 6, state=state, before=call)
    assert done.ids[0] == [words.y, words.y, words.start, words.end, words.x, words.x]


def test_t23_every_token_is_counted_once(run: Any, words: Any) -> None:
    script = [words.start, *[words.x] * 30]
    rows = [
        (ThinkingConfig(4), words.hybrid, script),
        (ThinkingConfig(4), words.opened, script[1:]),
        (ThinkingConfig(0), words.opened, script[1:]),
        (ThinkingConfig(0), words.hybrid, [words.y] * 9),
        (ThinkingConfig(), words.hybrid, [words.y] * 9),
        (None, words.opened, [words.x, words.end, words.y, words.eos, words.y]),
    ]
    done = run(rows, 24)
    text = len(done.state.tokens.texts["qwen3"])
    found = [(s.tokens, s.forced_tokens, s.marker_tokens, s.blocks, s.reason) for s in done.stats]
    assert found == [
        (4, min(text, 19), 1, 1, "budget"),
        (4, min(text, 20), 0, 1, "budget"),
        (0, len(done.state.tokens.texts["short"]) - 1, 0, 1, "disabled"),
        (0, len(done.state.tokens.empty_block), 0, 0, "disabled"),
        (0, 0, 0, 0, "none"),
        (1, 0, 1, 1, "natural"),
    ]
    assert [s.generated_tokens for s in done.stats] == [24, 24, 24, 24, 24, 4]
    assert all(s.reasoning_tokens == s.generated_tokens - s.answer_tokens for s in done.stats)
    assert done.stats[4].reasoning_tokens == 0


def test_t24_stop_strings_are_looked_for_in_the_answer_only(run: Any, words: Any, tokens: Any, tokenizer: Any) -> None:
    """Neither thinking nor a forced text can match, since a stream tells the parts apart by tokens."""
    answer = list(tokenizer.encode("the limited time", add_special_tokens=False))
    script = [*tokenizer.encode("limited x", add_special_tokens=False)] * 3
    script = [*script[:8], *[words.x] * len(tokens.texts["qwen3"]), *answer, *[words.y] * 40]
    done = run([(ThinkingConfig(8), words.opened, script)], 8 + len(tokens.texts["qwen3"]) + len(answer))
    stream = ThinkingStream(tokens, words.opened)
    parts: dict[str, str] = {"thinking": "", "answer": ""}
    matched = []
    for i, token in enumerate(done.ids[0]):
        for piece in stream.push(token):
            parts[piece.part] += piece.text
        if "limited" in parts["answer"]:
            matched.append(i)
    assert "limited" in parts["thinking"]
    assert "Considering the limited time by the user" in parts["thinking"]
    assert matched
    assert matched[0] >= 8 + len(tokens.texts["qwen3"])


class Other:
    """A tokenizer in which some texts are other ids than usual."""

    def __init__(self, inner: Any, ids: dict[str, list[int]]) -> None:
        self.inner, self.ids = inner, ids

    def encode(self, text: str, **given: Any) -> list[int]:
        return self.ids.get(text) or list(self.inner.encode(text, **given))

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_t27_a_tokenizer_without_the_markers_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"</think> is \[27, 14, 26865, 29\] for this tokenizer"):
        ThinkingTokens.of(Other(tokenizer, {"</think>": [27, 14, 26865, 29]}))
    with pytest.raises(ValueError, match=r"<think> is \[0\] for this tokenizer"):
        ThinkingTokens.of(Other(tokenizer, {"<think>": [0]}))  # one token, but not this text


def test_t27_ids_come_from_the_tokenizer(qwen: Any, tokens: Any) -> None:
    assert (qwen.start, qwen.end, qwen.tool, qwen.wait) == (151667, 151668, 151657, 3783)
    assert (tokens.start, tokens.end) == (494, 495)
    assert tokens.ids().tolist()[:2] == [494, 495]
    assert tokens.eos == (472, 470)


@pytest.mark.parametrize(
    ("config", "given", "text"),
    [
        (
            ThinkingConfig(5, stop_text=[1, 2]),
            {},
            r"stop_text \(1, 2\) is \[1, 2\]; it must hold </think> \(495\) once",
        ),
        (ThinkingConfig(5, stop_text=[495, 494]), {}, r"no <think> \(494\)"),
        (ThinkingConfig(5, stop_text=[495, 512]), {}, "only ids below 512"),
        (
            ThinkingConfig(5),
            {"max_forced": 8},
            r"closing texts of \d+ tokens in rows of 8; make the state with max_forc",
        ),
        (ThinkingConfig(reserve_answer=5), {}, "reserve_answer 5 needs max_new_tokens"),
    ],
)
def test_a_row_that_the_state_cannot_serve_is_refused(tokens: Any, config: Any, given: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ThinkingState(1, tokens, **given).admit(0, config, [])


def test_a_row_that_is_not_there_is_named(tokens: Any) -> None:
    state = ThinkingState(2, tokens)
    for call in (state.release, state.end_now, state.stats, state.save):
        with pytest.raises(IndexError, match=r"row 2; there are rows 0..1"):
            call(2)


def test_a_row_costs_at_most_512_bytes(tokens: Any) -> None:
    state = ThinkingState(3, tokens).state
    assert state[0].numel() * state.element_size() <= 512
