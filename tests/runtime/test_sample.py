"""Sampling: the filters by their definition, distributions, independence of rows, one graph for all settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.runtime.sample import GREEDY, Sampler, SamplingParams

VOCAB = 50


def filtered(logits: Tensor, p: SamplingParams) -> Tensor:
    """The distribution that `p` leaves of one row, token by token from the definitions."""
    probs = (logits.double() / p.temperature).softmax(-1)
    order = sorted(range(len(probs)), key=lambda i: -float(probs[i]))
    order = order[: p.top_k or len(order)]
    mass = sum(float(probs[i]) for i in order)
    kept, before = [], 0.0
    for i in order:
        share = float(probs[i]) / mass
        if (before < p.top_p and share >= p.min_p * float(probs[order[0]]) / mass) or not kept:
            kept.append(i)
        before += share
    out = torch.zeros_like(probs)
    out[kept] = probs[kept]
    return out / out.sum()


SETTINGS = [
    SamplingParams(seed=1),
    SamplingParams(temperature=0.6, top_k=20, top_p=0.95, seed=2),
    SamplingParams(temperature=1.5, top_k=5, seed=3),
    SamplingParams(top_p=0.3, seed=4),
    SamplingParams(temperature=2.0, min_p=0.4, seed=5),
    SamplingParams(temperature=0.8, top_k=10, top_p=0.7, min_p=0.05, seed=6),
    SamplingParams(top_p=1e-6, seed=7),
    SamplingParams(top_k=1, seed=8),
]


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_frequencies_are_those_of_the_filtered_distribution(params: SamplingParams) -> None:
    """4000 draws of one row: chi squared below its 1 - 1e-6 quantile, nothing outside the support."""
    logits = 2 * torch.randn(VOCAB)
    draws, sampler = 4000, Sampler(1, max_top_k=None)
    sampler.set_row(0, params)
    found = torch.zeros(VOCAB, dtype=torch.float64)
    for _ in range(draws):
        found[sampler(logits[None])] += 1
    wanted = filtered(logits, params) * draws
    assert not found[wanted == 0].any()
    few = wanted < 5
    pairs = [(found[~few], wanted[~few]), (found[few].sum()[None], wanted[few].sum()[None])]
    chi = sum(float(((f - w) ** 2 / w.clamp(min=1e-9)).sum()) for f, w in pairs if float(w.sum()) > 1)
    freedom = max(int((~few).sum()), 1)
    assert chi < freedom + 5 * (2 * freedom) ** 0.5 + 15


@pytest.mark.parametrize("params", [p for p in SETTINGS if p.top_k > 0], ids=str)
def test_candidates_by_topk_are_those_of_the_whole_vocabulary(params: SamplingParams) -> None:
    few, all_ = Sampler(3, max_top_k=20), Sampler(3, max_top_k=None)
    for row in range(3):
        few.set_row(row, params)
        all_.set_row(row, params)
    for _ in range(50):
        logits = torch.randn(3, VOCAB)
        assert torch.equal(few(logits), all_(logits))


@pytest.mark.parametrize("candidates", [16, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_equal_logits_are_ordered_by_id(dtype: torch.dtype, candidates: int | None) -> None:
    """Tokens drawn are those at the drawn places of a stable sort, however many logits are equal."""
    sampler, places = Sampler(3, max_top_k=candidates), Sampler(3, max_top_k=candidates)
    for one in (sampler, places):
        for row in range(3):
            one.set_row(row, SamplingParams(temperature=3.0, top_k=16, seed=row))
    for _ in range(30):
        logits = (2 * torch.randn(3, 1500)).round().to(dtype)
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        drawn = places(values)  # sorted already: a token's id is its place
        assert torch.equal(sampler(logits), ids.gather(1, drawn[:, None])[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_greedy_rows_are_argmax(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 5000).to(dtype)  # in bfloat16 the largest are often equal
    for sampler in (
        Sampler(4),
        Sampler(4, greedy=True),
        Sampler(4, max_top_k=None),
        Sampler.fitting([GREEDY] * 4, 5000),
    ):
        assert torch.equal(sampler(logits), logits.argmax(-1))


def test_a_rows_tokens_depend_on_nothing_but_its_own() -> None:
    """The same row alone, in another place, among other neighbours, and moved in the middle."""
    logits = torch.randn(30, 1, VOCAB)
    mine = SamplingParams(top_k=30, seed=11)
    alone, crowd = Sampler(1), Sampler(4)
    alone.set_row(0, mine)
    for row, other in enumerate((SamplingParams(top_k=3, seed=5), GREEDY, mine, SamplingParams(top_k=7))):
        crowd.set_row(row, other)
    place = 2
    for step in range(30):
        if step == 13:
            crowd.permute_rows(torch.tensor([2, 0, 1, 3]))
            place = 0
        batch = torch.randn(4, VOCAB)
        batch[place] = logits[step, 0]
        assert crowd(batch)[place] == alone(logits[step])[0]


def test_seeds_make_streams_and_steps_continue_them() -> None:
    logits = torch.zeros(1, 1000)

    def stream(seed: int | None, start: int, stop: int) -> list[int]:
        sampler = Sampler(1, max_top_k=None)
        sampler.set_row(0, SamplingParams(seed=seed), steps=start)
        return [int(sampler(logits)) for _ in range(start, stop)]

    assert stream(1, 0, 50) == stream(1, 0, 20) + stream(1, 20, 50)
    assert len({tuple(stream(seed, 0, 20)) for seed in (0, 1, 2, 1 << 32, (1 << 64) - 1)}) == 5
    torch.manual_seed(4)
    first = stream(None, 0, 20)
    assert stream(None, 0, 20) != first
    torch.manual_seed(4)
    assert stream(None, 0, 20) == first


def test_penalties_by_their_definition() -> None:
    params = SamplingParams(0.0, repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.3)
    sampler = Sampler(2, vocab_size=6)
    sampler.set_row(0, params, prompt_ids=[5, 5])
    for ids in ([1, 1], [1, 2], [3, 3]):
        sampler.observe(torch.tensor(ids))
    logits = torch.tensor([[1.0, 2.0, -1.0, -2.0, 0.5, 3.0]]).repeat(2, 1)
    found = sampler._penalised(logits, sampler.settings[0])
    torch.testing.assert_close(found[0], torch.tensor([1.0, 2 / 1.5 - 1.0, -1.0, -3.0 - 0.7, 0.5, 2.0]))
    assert torch.equal(found[1], logits[1])
    assert sampler(logits).tolist() == [5, 5]


def test_answering_rows_have_settings_of_their_own() -> None:
    sampler = Sampler(2, max_top_k=VOCAB)
    for row in range(2):
        sampler.set_row(row, SamplingParams(temperature=5.0, top_k=VOCAB, seed=row), answer=GREEDY)
    logits = torch.randn(20, 2, VOCAB)
    drawn = torch.stack([sampler(x, torch.tensor([True, False])) for x in logits])
    assert torch.equal(drawn[:, 0], logits[:, 0].argmax(-1))
    assert not torch.equal(drawn[:, 1], logits[:, 1].argmax(-1))


@pytest.mark.parametrize("make", [{}, {"greedy": True}, {"max_top_k": None}, {"vocab_size": VOCAB}], ids=str)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_one_graph_for_all_settings(make: dict[str, Any], backend: str) -> None:
    sampler, plain, logits = Sampler(3, **make), Sampler(3, **make), torch.randn(8, 3, VOCAB)
    step = torch.compile(sampler, backend=backend, fullgraph=True)
    with torch.compiler.set_stance("default"), torch._dynamo.config.patch(error_on_recompile=True):
        for i, x in enumerate(logits):
            if not make.get("greedy"):
                for one in (sampler, plain):
                    one.set_row(i % 3, SamplingParams(temperature=i / 4, top_k=1 + i, top_p=0.9, seed=i))
            assert torch.equal(step(x), plain(x))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"temperature": -1}, "temperature -1; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"temperature": "1"}, "temperature '1' is str; it must be a number"),
        ({"top_k": -1}, "top_k -1; it must be 0"),
        ({"top_k": 1.5}, "top_k 1.5 is float; it must be an int"),
        ({"top_k": True}, "top_k True is bool"),
        ({"top_p": 0}, "top_p 0; it must be more than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"min_p": 2}, "min_p 2; it must be at least 0 and at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty 0; it must be more than 0"),
        ({"presence_penalty": 3}, "presence_penalty 3"),
        ({"frequency_penalty": None}, "frequency_penalty None is NoneType"),
        ({"seed": -1}, "seed -1"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(values: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"SamplingParams: {text}"):
        SamplingParams(**values)


def test_a_row_that_the_sampler_cannot_serve_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k 65 .* of a sampler for 1..64; make the sampler with max_top_k=65"):
        Sampler(1).set_row(0, SamplingParams(top_k=65))
    with pytest.raises(ValueError, match=r"top_k 0 .*make the sampler with max_top_k=None"):
        Sampler(1).set_row(0, SamplingParams())
    with pytest.raises(ValueError, match="is not greedy"):
        Sampler(1, greedy=True).set_row(0, SamplingParams(top_k=2))
    with pytest.raises(ValueError, match=r"has a penalty; make the sampler with vocab_size"):
        Sampler(1).set_row(0, SamplingParams(0.0, presence_penalty=1))
    with pytest.raises(IndexError, match=r"row 2; there are rows 0..1"):
        Sampler(2).set_row(2, GREEDY)


def test_the_leanest_sampler_is_made() -> None:
    assert Sampler.fitting([GREEDY], 99).greedy
    mixed = Sampler.fitting([SamplingParams(top_k=7), GREEDY, SamplingParams(top_k=3)], 99)
    assert (mixed.max_top_k, mixed.penalties, mixed.rows) == (8, False, 3)
    for size in (99, 9999):  # top_k 0 is the whole vocabulary
        assert Sampler.fitting([SamplingParams(), SamplingParams(top_k=7)], size).max_top_k is None
    assert Sampler.fitting([SamplingParams(0.0, presence_penalty=1)], 9).counts.shape == (1, 9)
