"""T6..T8, T17..T20, T30: rows beside each other, moved, saved, drafted for, and sampled."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from qwenopt.ops.budget_state import Column, Phase
from qwenopt.runtime.sample import GREEDY, Sampler, SamplingParams
from qwenopt.runtime.tail import Choices
from qwenopt.runtime.thinking import ThinkingConfig
from qwenopt.runtime.thinking_replay import replay, verify_draft
from qwenopt.runtime.thinking_state import ThinkingState
from qwenopt.testing.scripted import ScriptedLM, play

STEPS = 40


def samplers(rows: int, seeds: range) -> Sampler:
    sampler = Sampler(rows, max_top_k=30)
    for row, seed in enumerate(seeds):
        sampler.set_row(row, SamplingParams(temperature=4.0, top_k=30, seed=seed))
    return sampler


def test_t06_rows_without_a_budget_are_bit_identical(tokens: Any, words: Any, wrap: Any) -> None:
    """Unlimited and unused rows, beside one with a budget: ids, logits and random numbers as without the module."""
    state = ThinkingState(3, tokens)
    state.admit(0, None, words.opened)
    state.admit(1, ThinkingConfig(3), words.opened)
    tail, sampler, plain = wrap(state), samplers(3, range(3)), samplers(3, range(3))
    for step in range(STEPS):
        logits = 3 * torch.randn(3, 512)
        logits[0, 100], logits[2, 494] = -0.0, -torch.inf
        mine = logits.clone()
        ids, wanted = tail(mine, sampler, None, None), plain(logits)
        assert torch.equal(mine.view(torch.int32)[[0, 2]], logits.view(torch.int32)[[0, 2]])
        assert ids[[0, 2]].tolist() == wanted[[0, 2]].tolist(), step
        assert torch.equal(sampler.steps, plain.steps)
    assert state.stats(1).reason == "budget"


def random_rows(tokens: Any, words: Any, count: int) -> list[tuple[ThinkingConfig, list[int], list[int]]]:
    rng = random.Random(3)
    rows = []
    for _ in range(count):
        config = ThinkingConfig(rng.choice([None, 0, 1, 3, 9, 20]), stop_text=rng.choice(["qwen3", "short"]))
        script = [rng.choice([words.x, words.y, words.newline, *words.han]) for _ in range(60)]
        if rng.random() < 0.3:
            script[rng.randrange(20)] = words.end
        rows.append((config, rng.choice([words.hybrid, words.opened]), [words.start, *script]))
    return rows


def test_t07_a_mixed_batch_equals_each_row_alone(run: Any, tokens: Any, words: Any) -> None:
    rows = random_rows(tokens, words, 12)
    together = run(rows, STEPS)
    for i, row in enumerate(rows):
        alone = play(ThinkingState(1, tokens), [row[0]], [row[1]], ScriptedLM([row[2]], 512, seed=1000 * i), STEPS)
        assert (alone.ids[0], alone.stats[0]) == (together.ids[i], together.stats[i])


def test_t08_swapped_and_reused_slots_keep_to_themselves(tokens: Any, words: Any, wrap: Any) -> None:
    """vLLM 49613: after a swap the end marker was forced into another client's answer."""
    state = ThinkingState(2, tokens)
    state.admit(0, ThinkingConfig(6), words.opened)
    state.admit(1, None, words.opened)
    tail, greedy = wrap(state), Sampler(2, greedy=True)
    model = ScriptedLM([[words.x] * 9, [words.y] * 9], 512)
    out = []
    for step in range(40):
        if step == 4:
            state.swap(0, 1)
        logits = model(step) if step < 4 else model(step).flip(0)
        out.append(tail(logits, greedy, None, None))
    assert torch.stack(out)[4:, 0].tolist() == [words.y] * 36
    assert torch.stack(out)[4:, 1].tolist() == [words.x] * 2 + list(tokens.texts["qwen3"])[:34] + [words.x] * max(
        0, 34 - len(tokens.texts["qwen3"])
    )
    state.release(1)
    state.admit(1, None, words.opened)
    assert state.stats(1).generated_tokens == 0
    assert tail(model(0), greedy, None, None).tolist() == [words.x, words.y]


def test_t17_forced_tokens_come_through_every_filter(run: Any, tokens: Any, words: Any) -> None:
    """Filters, penalties, a bias of -100 on the marker and a mask of all but one token cannot stop them."""
    settings = [
        SamplingParams(temperature=0.6, top_k=1, seed=1),
        SamplingParams(top_p=1e-6, top_k=20, seed=2),
        SamplingParams(top_k=20, repetition_penalty=2.0, presence_penalty=2.0, frequency_penalty=2.0, seed=3),
        GREEDY,
    ]
    sampler = Sampler(4, vocab_size=512)
    for row, one in enumerate(settings):
        sampler.set_row(row, one)
    scripted = ScriptedLM([[words.x, words.y]] * 4, 512)

    def model(step: int) -> torch.Tensor:
        logits = scripted(step)
        logits[:, words.end] -= 100
        logits[3] = torch.where(torch.arange(512) == words.x, logits[3], -torch.inf)  # what a grammar leaves
        return logits

    rows = [ThinkingConfig(3, boundary="none")] * 4
    state = ThinkingState(4, tokens)
    text = list(tokens.texts["qwen3"])
    done = play(state, rows, [words.opened] * 4, model, 3 + len(text), sampler=sampler)
    assert [ids[3:] for ids in done.ids] == [text] * 4


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("quality", [0.0, 0.6, 1.0])
def test_t18_drafts_change_nothing(tokens: Any, words: Any, k: int, quality: float) -> None:
    """Drafted tokens checked by the target give what one token at a time gives, wherever a budget falls in a draft."""
    rows = random_rows(tokens, words, 10)
    configs, prompts = [row[0] for row in rows], [row[1] for row in rows]
    model = ScriptedLM([row[2] for row in rows], 512)
    plain = play(ThinkingState(10, tokens), configs, prompts, model, STEPS + 8)
    state, rng = ThinkingState(10, tokens), random.Random(k)
    for row in range(10):
        state.admit(row, configs[row], prompts[row])
    out: list[list[int]] = [[] for _ in rows]
    scripts = model.scripts
    while min(map(len, out)) < STEPS:
        target = [[s[min(len(o) + j, len(s) - 1)] for j in range(k + 1)] for s, o in zip(scripts, out, strict=True)]
        draft = [
            [(p[len(o) + j] if len(o) + j < len(p) else 0) if rng.random() < quality else words.y for j in range(k)]
            for p, o in zip(plain.ids, out, strict=True)
        ]
        ids, count = verify_draft(state, torch.tensor(draft), torch.tensor(target))
        assert quality < 1 or k == 0 or int(count.min()) > 0
        for one, found, n in zip(out, ids.tolist(), count.tolist(), strict=True):
            one += found[:n]
    guarded = [row for row, ids in enumerate(plain.ids) if ids[:STEPS] != out[row][:STEPS]]
    assert not guarded


@pytest.mark.parametrize("way", ["save", "replay"])
def test_t19_preempted_at_every_step(tokens: Any, words: Any, way: str) -> None:
    script = [words.x, words.x, words.x, *words.han, *[words.y] * 40]
    config, greedy = ThinkingConfig(5, stop_text="short"), Sampler(1, greedy=True)
    model = ScriptedLM([script], 512)
    whole = play(ThinkingState(1, tokens), [config], [words.opened], model, 16)
    phases = set()
    for stop in range(16):
        first = play(ThinkingState(1, tokens), [config], [words.opened], model, stop)
        phases.add(int(first.state.state[0, Column.PHASE]))
        later = ThinkingState(1, tokens)
        if way == "save":
            later.restore(0, first.state.save(0))
        else:
            later.admit(0, config, words.opened)
            replay(later, 0, first.ids[0] if stop else [])
            assert torch.equal(later.state, first.state.state)
        rest = [int(later(model(step), greedy)[0]) for step in range(stop, 16)]
        assert (first.ids[0] if stop else []) + rest == whole.ids[0]
        assert later.stats(0) == whole.stats[0]
    assert phases >= {Phase.THINK, Phase.GRACE, Phase.FORCE, Phase.ANSWER}


@pytest.mark.parametrize("config", [ThinkingConfig(3, stop_text="bare"), ThinkingConfig(9, exit_stop_text="bare")])
def test_t19_a_forced_marker_is_told_from_the_models_own(tokens: Any, words: Any, config: ThinkingConfig) -> None:
    """By its place: the guards after a forced end are on again. The second is closed by an end of the text."""
    script = [words.x, words.x, words.x if config.budget == 3 else words.eos, *[words.y] * 9]
    done = play(ThinkingState(1, tokens), [config], [words.opened], ScriptedLM([script], 512), 8)
    place = done.ids[0].index(words.end)
    again = ThinkingState(1, tokens)
    again.admit(0, config, words.opened)
    replay(again, 0, done.ids[0], {place})
    assert torch.equal(again.state, done.state.state)
    again.admit(0, config, words.opened)
    replay(again, 0, done.ids[0])
    assert again.stats(0).reason == "natural"


def test_t19_what_cannot_be_replayed_is_refused(tokens: Any, words: Any) -> None:
    from qwenopt.runtime.thinking_exits import MarginRule

    state = ThinkingState(1, tokens, signals=("margin",))
    state.admit(0, ThinkingConfig(2), words.opened)
    with pytest.raises(ValueError, match=r"token 2 of row 0 is 87, but its configuration emits"):
        replay(state, 0, [words.x] * 5)
    state.admit(0, ThinkingConfig(exits=(MarginRule(),)), words.opened)
    with pytest.raises(ValueError, match=r"row 0 has exit rules.*use save and restore"):
        replay(state, 0, [words.x])


def test_t20_rows_follow_beams(tokens: Any, words: Any) -> None:
    """Rows gathered by the parents of beams: each goes on as its parent's copy would."""
    state, greedy = ThinkingState(4, tokens), Sampler(4, greedy=True)
    for row, budget in enumerate((3, 5, 7, 9)):
        state.admit(row, ThinkingConfig(budget, stop_text="bare"), words.opened)
    model = ScriptedLM([[words.x] * 20] * 4, 512)
    for step in range(4):
        state(model(step), greedy)
    state.permute_rows([2, 2, 1, 0])
    out = torch.stack([state(model(step), greedy) for step in range(4, 12)], 1).tolist()
    assert [ids.index(words.end) if words.end in ids else -1 for ids in out] == [3, 3, 1, -1]
    assert [state.stats(row).tokens for row in range(4)] == [7, 7, 5, 3]


def test_t30_the_answer_is_sampled_by_its_own_settings(run: Any, tokens: Any, words: Any) -> None:
    sampler = Sampler(1, max_top_k=200)
    sampler.set_row(0, SamplingParams(temperature=50.0, top_k=200, seed=1), answer=GREEDY)
    config = ThinkingConfig(20, stop_text="bare", answer_sampling=GREEDY, reclose_guard=0)
    done = run([(config, words.opened, [words.x] * 60)], 50, sampler=sampler)
    cut = done.ids[0].index(words.end)
    assert len(set(done.ids[0][:cut])) > 10
    assert done.ids[0][cut + 1 :] == [words.x] * (50 - cut - 1)


def test_rows_that_sit_out_stay_as_they_are(tokens: Any, words: Any, wrap: Any) -> None:
    state, sampler = ThinkingState(2, tokens), samplers(2, range(2))
    for row in range(2):
        state.admit(row, ThinkingConfig(3), words.opened)
    tail, saved = wrap(state), state.save(1)
    for _ in range(5):
        tail(torch.randn(2, 512), sampler, torch.tensor([True, False]), None)
    assert torch.equal(state.save(1)[0], saved[0])
    assert sampler.steps.tolist() == [5, 0]
    assert state.stats(0).generated_tokens == 5


def test_t28_forced_tokens_at_once_leave_everything_as_a_step_each_does(tokens: Any, words: Any) -> None:
    """State, random numbers and what penalties have seen."""

    def run(append: bool) -> tuple[list[int], Choices]:
        sampling = SamplingParams(temperature=4.0, top_k=30, seed=1, presence_penalty=0.5)
        configs = [ThinkingConfig(5, boundary="none"), ThinkingConfig()]
        choices = Choices(sampling, configs, tokens, 2, 512, torch.device("cpu"))
        for row in range(2):
            choices.begin(row, row, words.opened, 80)
        model, out = ScriptedLM([[words.x], [words.y]], 512), []
        while len(out) < 80:
            out.append(int(choices.tail(model(len(out)), torch.tensor([True, False]))[0]))
            out += choices.forced(0) if append else []
        return out[:80], choices

    (single, one), (whole, two) = run(False), run(True)
    assert one.stats(0).forced_tokens == len(tokens.texts["qwen3"])
    assert single == whole
    assert one.stats(0) == two.stats(0)
    assert torch.equal(one.tail.thinking.state, two.tail.thinking.state)
    for name in ("steps", "counts"):
        assert torch.equal(getattr(one.tail.sampler, name), getattr(two.tail.sampler, name))
