"""T1..T26: where a block ends, and with what, by scripts that a greedy sampler follows."""

from __future__ import annotations

from typing import Any

import pytest

from qwenopt.runtime.thinking import ThinkingConfig

QWEN_TEXT = [
    271, 82796, 279, 7199, 882, 553, 279, 1196, 11, 358, 614, 311, 2968, 279, 6291, 3118, 389, 279, 7274, 5961, 1431,
    624, 151668, 271,
]  # fmt: skip


def test_t01_budget_is_exact(run: Any, qwen: Any) -> None:
    budgets = (1, 2, 7, 64)
    script = [qwen.start, 198, *[100] * 200]
    rows = [(ThinkingConfig(n), [qwen.turn, 77091, 198], script) for n in budgets]
    done = run(rows, 100, tokens=qwen)
    for n, ids, stats in zip(budgets, done.ids, done.stats, strict=True):
        assert ids[0] == 151667
        assert ids[1 + n : 1 + n + 24] == QWEN_TEXT
        assert ids[1 : 1 + n] == [198, *[100] * (n - 1)]
        assert set(ids[1 + n + 24 :]) == {100}
        assert (stats.tokens, stats.forced_tokens, stats.reason, stats.exit_step) == (n, 24, "budget", n + 1)


@pytest.mark.parametrize("thought", [4, 5], ids=["before the budget", "at the budget"])
def test_t03_natural_end_is_left_alone(run: Any, words: Any, thought: int) -> None:
    script = [words.start, *[words.x] * thought, words.end, *[words.y] * 30]
    done = run([(ThinkingConfig(5), words.hybrid, script)], 30)
    assert done.ids[0] == script[:30]
    assert done.stats[0].reason == "natural"
    assert (done.stats[0].tokens, done.stats[0].forced_tokens) == (thought, 0)


def test_t05_small_budgets_behind_an_opened_block(run: Any, words: Any, tokens: Any) -> None:
    rows = [(ThinkingConfig(n, stop_text="short"), words.opened, [words.x] * 9) for n in (0, 1)]
    none, one = run(rows, 8).ids
    short = list(tokens.texts["short"])
    # The newline that the template wrote is not written twice, and is not charged.
    assert none == [*short[1:], *[words.x] * 8][:8]
    assert one == [words.x, *short, *[words.x] * 8][:8]


def test_t09_a_character_is_never_cut(run: Any, words: Any, tokens: Any) -> None:
    script = [words.x, *words.han, *words.han, words.x, *[words.y] * 40]
    rows = [(ThinkingConfig(n, stop_text="bare"), words.opened, script) for n in range(1, 9)]
    done = run([*rows, (ThinkingConfig(2, stop_text="bare", boundary="none"), words.opened, script)], 20)
    for n, (ids, stats) in enumerate(zip(done.ids[:-1], done.stats[:-1], strict=True), 1):
        cut = ids.index(words.end)
        assert cut == {2: 4, 3: 4, 5: 7, 6: 7}.get(n, n)
        assert stats.tokens == cut
        assert "\ufffd" not in tokens.tokenizer.decode(ids[:cut])
        assert stats.reason == "budget"
    assert done.ids[-1].index(words.end) == 2  # asked for


def test_t09_the_wait_for_a_character_ends(run: Any, words: Any) -> None:
    """A character that is begun again and again is cut after three tokens."""
    script = [words.x, *[words.han[0]] * 30]
    done = run([(ThinkingConfig(2, stop_text="bare"), words.opened, script)], 20)
    assert done.ids[0].index(words.end) == 5


def test_t10_a_boundary_in_the_window_ends_the_block(run: Any, words: Any) -> None:
    near = [*[words.x] * 16, words.stop, *[words.x] * 40]
    far = [*[words.x] * 5, words.stop, *[words.x] * 40]
    late = [*[words.x] * 19, words.stop, words.stop, *[words.x] * 40]
    line = [*[words.x] * 13, words.stop, words.x, words.newline, *[words.x] * 40]
    sentence = ThinkingConfig(20, boundary="sentence", window=8, stop_text="bare")
    newline = ThinkingConfig(20, boundary="newline", window=8, stop_text="bare")
    done = run(
        [(c, words.opened, s) for c, s in ((sentence, near), (sentence, far), (sentence, late), (newline, line))], 40
    )
    assert [ids.index(words.end) for ids in done.ids] == [17, 20, 20, 16]
    assert [s.reason for s in done.stats] == ["window", "budget", "budget", "window"]


def test_t11_end_of_text_inside_a_block(run: Any, words: Any, tokens: Any) -> None:
    script = [words.x, words.eos, *[words.y] * 20]
    rows = [(ThinkingConfig(50, on_eos=how), words.opened, script) for how in ("stop", "close", "auto")]
    done = run([*rows, (ThinkingConfig(), words.opened, script)], 12)
    stop, close, auto, unlimited = done.ids
    assert stop == unlimited == script[:12]
    assert close == auto == [words.x, *tokens.texts["short"], *[words.y] * 20][:12]
    assert [s.reason for s in done.stats] == ["eos"] * 4
    # After the end of the text nothing is counted.
    assert [s.generated_tokens for s in done.stats] == [2, 12, 12, 2]


def test_t12_tool_call_ends_the_block(run: Any, words: Any) -> None:
    script = [words.x, words.x, words.tool, *[words.y] * 20]
    done = run([(ThinkingConfig(3), words.opened, script), (ThinkingConfig(2), words.opened, script)], 20)
    assert done.ids == [script[:20]] * 2
    assert [(s.reason, s.forced_tokens, s.tokens) for s in done.stats] == [("tool", 0, 2)] * 2


def test_t13_second_block(run: Any, words: Any) -> None:
    again = [*[words.x] * 4, *[words.y] * 3, words.start, *[words.x] * 20]
    config = {"budget": 4, "stop_text": "bare", "reclose_guard": 0}
    rows = [(ThinkingConfig(scope=scope, **config), words.opened, again) for scope in ("request", "block")]
    done = run(rows, 20)
    closed = [*[words.x] * 4, words.end, *[words.y] * 2, words.start]
    assert done.ids[0] == [*closed, words.end, *[words.x] * 11]
    assert done.ids[1] == [*closed, *[words.x] * 4, words.end, *[words.x] * 7]
    assert [s.blocks for s in done.stats] == [2, 2]


def test_t13_markers_are_guarded_after_a_forced_end(run: Any, words: Any) -> None:
    for marker in (words.start, words.end):
        script = [*[words.x] * 5, *[marker] * 20]
        done = run([(ThinkingConfig(4, stop_text="bare", reclose_guard=8), words.opened, script)], 20)
        assert done.ids[0][4] == words.end
        assert done.ids[0].index(marker, 5) == 5 + 8
    natural = [words.end, words.start, *[words.x] * 8]
    assert run([(ThinkingConfig(4), words.opened, natural)], 3).ids[0] == natural[:3]


def test_t14_the_answer_keeps_its_reserve(run: Any, words: Any, tokens: Any) -> None:
    length = len(tokens.texts["qwen3"])
    script = [words.x] * 300
    for boundary, slack in (("none", 0), ("utf8", 3)):
        config = ThinkingConfig(reserve_answer=7, boundary=boundary)
        done = run([(config, words.opened, script)], 100, max_new=100)
        assert done.stats[0].reason == "reserve"
        assert done.stats[0].answer_tokens == 7 + slack
        assert done.stats[0].tokens == 100 - length - 7 - slack
    # Characters that are not whole where it ends cost of the slack, not of the reserve.
    done = run([(ThinkingConfig(reserve_answer=7), words.opened, words.han * 100)], 100, max_new=100)
    assert 7 <= done.stats[0].answer_tokens <= 10
    # A text longer than what is left is cut off by max_new_tokens like any other.
    assert run([(ThinkingConfig(2), words.opened, script)], 5, max_new=5).stats[0].forced_tokens == 3


def test_t15_the_phase_that_the_prompt_leaves(words: Any, tokens: Any) -> None:
    from qwenopt.ops.budget_state import Phase

    old = [tokens.turn, words.start, words.x, words.end, words.y]
    new = [tokens.turn, words.y]
    assert tokens.initial_phase([]) == (Phase.IDLE, 0)
    assert tokens.initial_phase(words.hybrid) == (Phase.IDLE, 0)
    assert tokens.initial_phase(words.opened) == (Phase.THINK, 0)
    assert tokens.initial_phase([*words.hybrid, words.start]) == (Phase.THINK, 0)
    assert tokens.initial_phase([*words.opened, words.x, words.newline]) == (Phase.THINK, 2)
    assert tokens.initial_phase([*words.hybrid, words.start, words.x]) == (Phase.THINK, 1)
    assert tokens.initial_phase([*words.opened, words.end]) == (Phase.ANSWER, 0)
    assert tokens.initial_phase([*old, *new]) == (Phase.IDLE, 0)
    assert tokens.initial_phase([tokens.turn, words.start, words.x, *new]) == (Phase.IDLE, 0)
    assert tokens.initial_phase([*old, *new, words.start, words.newline]) == (Phase.THINK, 0)


def test_t15_thinking_of_the_prompt_counts_unless_told(run: Any, words: Any) -> None:
    prompt = [*words.opened, words.x, words.x]
    rows = [(ThinkingConfig(5, stop_text="bare", count_prompt=c), prompt, [words.x] * 20) for c in (True, False)]
    done = run([*rows, (ThinkingConfig(5), [*words.opened, words.end], [words.x] * 20)], 12)
    assert [ids.index(words.end) for ids in done.ids[:2]] == [3, 5]
    assert done.ids[2] == [words.x] * 12
    assert done.stats[2].reason == "disabled"


def test_t16_an_empty_block_of_the_model_is_natural(run: Any, words: Any) -> None:
    """What a model writes after /no_think."""
    script = [words.start, words.paragraph[0], words.end, words.paragraph[0], *[words.y] * 9]
    done = run([(ThinkingConfig(64), words.hybrid, script)], 9)
    assert done.ids[0] == script[:9]
    assert (done.stats[0].reason, done.stats[0].tokens) == ("natural", 1)


def test_t26_least_thinking_by_mask_and_by_wait(run: Any, words: Any, tokens: Any) -> None:
    script = [words.x, *[words.end] * 20]
    rows = [(ThinkingConfig(min_tokens=5, min_action=how), words.opened, script) for how in ("mask", "wait")]
    mask, wait = run(rows, 12).ids
    assert mask.index(words.end) == 5
    assert wait == [words.x, *[tokens.wait] * 4, *[words.end] * 7]
