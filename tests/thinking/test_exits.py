"""T25: each rule ends a block exactly where its signal says so, at a boundary, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwenopt.runtime.thinking import ThinkingConfig
from qwenopt.runtime.thinking_exits import EntropyRule, LoopRule, MarginRule, ProbeRule
from qwenopt.runtime.thinking_state import ThinkingState


class Signals:
    """A scripted model whose logits carry a given margin of the end marker, or a given entropy, at each step."""

    def __init__(self, script: list[int], end: int, margins: list[float] | None = None, flat: list[bool] | None = None):
        self.script, self.end, self.margins, self.flat = script, end, margins, flat

    def __call__(self, step: int) -> torch.Tensor:
        logits = torch.full((1, 512), -20.0)
        logits[0, self.script[min(step, len(self.script) - 1)]] = 10.0
        if self.flat is not None and self.flat[step]:
            logits[0, :300] = 9.5
        logits[0, self.end] = 10.0 - (self.margins[step] if self.margins else 8.0)
        return logits


def play_one(run: Any, words: Any, rules: tuple[Any, ...], model: Any, steps: int, **given: Any) -> Any:
    from qwenopt.testing.scripted import play

    state = ThinkingState(1, given.pop("tokens"), signals=("margin", "entropy"), probe=given.pop("probe", None))
    least = given.pop("min_tokens", 0)
    config = ThinkingConfig(exits=rules, exit_stop_text="bare", min_tokens=least)
    return play(state, [config], [words.opened], model, steps, **given)


def sentences(words: Any, count: int) -> list[int]:
    return [words.x, words.x, words.stop] * count


def test_t25_margin(run: Any, words: Any, tokens: Any, wrap: Any) -> None:
    """Below tau at step 7 (no boundary before it) and at step 9 (the last token, at 8, ended a sentence)."""
    margins = [5.0] * 40
    margins[0] = margins[7] = margins[9] = 0.2  # at 0 nothing has been thought, though the prompt ends in a newline
    done = play_one(run, words, (MarginRule(0.25),), Signals(sentences(words, 20), words.end, margins), 20,
                    tokens=tokens, wrap=wrap)  # fmt: skip
    assert done.ids[0].index(words.end) == 9
    assert (done.stats[0].reason, done.stats[0].exit_step) == ("margin", 9)


def test_t25_patience_needs_boundaries_in_a_row(run: Any, words: Any, tokens: Any) -> None:
    margins = [5.0] * 40
    for step in (3, 9, 12):  # boundaries are at 3, 6, 9, ...
        margins[step] = 0.1
    done = play_one(run, words, (MarginRule(0.25, patience=2),), Signals(sentences(words, 20), words.end, margins), 20,
                    tokens=tokens)  # fmt: skip
    assert done.ids[0].index(words.end) == 12


def test_t25_rules_wait_for_the_least_thinking(run: Any, words: Any, tokens: Any) -> None:
    model = Signals(sentences(words, 20), words.end, [0.1] * 40)
    done = play_one(run, words, (MarginRule(0.25),), model, 20, tokens=tokens, min_tokens=7)
    assert done.ids[0].index(words.end) == 9


def test_t25_loop(run: Any, words: Any, tokens: Any) -> None:
    """The same 20 tokens again and again: the fourth time their end is seen, the block ends, and an answer follows."""
    period = [*range(60, 79), words.stop]
    done = play_one(run, words, (LoopRule(4),), Signals(period * 10, words.end), 120, tokens=tokens)
    assert done.ids[0].index(words.end) == 80
    assert done.stats[0].reason == "loop"
    assert done.ids[0][81] == period[1]
    other = [token for i in range(10) for token in [*range(60 + i, 79 + i), words.stop]]
    assert play_one(run, words, (LoopRule(4),), Signals(other, words.end), 120, tokens=tokens).stats[0].reason == "none"


def test_t25_entropy_plateau(run: Any, words: Any, tokens: Any) -> None:
    """Flat logits until step 30, sharp ones after: the averages settle later, never while it was uncertain."""
    rule = EntropyRule(mean=0.5, variance=0.05, alpha=0.5, boundary="sentence")
    model = Signals(sentences(words, 60), words.end, flat=[step < 30 for step in range(200)])
    done = play_one(run, words, (rule,), model, 120, tokens=tokens)
    exit_step = done.stats[0].exit_step
    assert done.stats[0].reason == "entropy"
    assert 30 < exit_step < 75
    assert exit_step % 3 == 0
    always = Signals(sentences(words, 60), words.end, flat=[False] * 200)
    assert play_one(run, words, (rule,), always, 120, tokens=tokens).stats[0].exit_step == 3 * rule.after


def test_t25_probe(run: Any, words: Any, tokens: Any, wrap: Any) -> None:
    """A linear probe of the hidden state, which crosses tau at step 10 and is looked at from boundary to boundary."""
    probe = torch.nn.Linear(4, 1)
    torch.nn.init.ones_(probe.weight)
    torch.nn.init.zeros_(probe.bias)
    rule = ProbeRule(tau=2.0, patience=2, boundary="sentence")
    with torch.no_grad():
        done = play_one(
            run, words, (rule,), Signals(sentences(words, 60), words.end), 40, tokens=tokens, probe=probe, wrap=wrap,
            hidden=lambda step: torch.full((1, 4), 1.0 if step >= 10 else 0.1),
        )  # fmt: skip
    assert done.ids[0].index(words.end) == 15
    assert done.stats[0].reason == "probe"


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (MarginRule(), r'margin rule reads what this state does not compute; make it with signals=\("margin",\)'),
        (EntropyRule(), 'signals=\\("entropy",\\)'),
        (ProbeRule(), "make it with probe="),
    ],
)
def test_a_rule_whose_signal_is_missing_is_refused(tokens: Any, rule: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ThinkingState(1, tokens).admit(0, ThinkingConfig(exits=(rule,)), [])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: MarginRule(tau=float("nan")), "tau nan; it must be a finite number"),
        (lambda: MarginRule(patience=0), "patience 0; it must be an int of at least 1"),
        (lambda: LoopRule(times=1), "times 1; it must be 2..64"),
        (lambda: EntropyRule(alpha=0), "alpha 0; it must be more than 0"),
        (lambda: ProbeRule(boundary="word"), "boundary 'word'; it must be one of"),  # type: ignore[arg-type]
        (lambda: ThinkingConfig(exits=(MarginRule(), MarginRule(0.1))), "they must be different ones of"),
    ],
)
def test_wrong_rules_are_named(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
