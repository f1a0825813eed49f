"""The probe: its fit, what it refuses, and that it leaves the world as it found it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwenopt.errors import QwenoptError
from qwenopt.runtime.thinking_probe import ThinkingProbe, area, fit_probe


def examples(noise: float = 0.3, questions: int = 40, each: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Right where one direction of eight is high, far from the origin and on another scale."""
    made = torch.Generator().manual_seed(3)
    hidden = torch.randn(questions * each, 8, generator=made)
    right = hidden[:, 2] - hidden[:, 5] + noise * torch.randn(len(hidden), generator=made) > 0
    return 100 + 20 * hidden, right, torch.arange(questions).repeat_interleave(each)


def test_a_fit_finds_what_is_there() -> None:
    hidden, right, question = examples()
    probe, fit = fit_probe(hidden, right, question)
    assert (fit.questions, fit.examples, fit.held_out_examples) == (40, 400, 80)
    assert fit.auc > 0.95
    assert fit.accuracy > 0.85
    assert fit.right == pytest.approx(float(right.float().mean()))
    score = probe(hidden.bfloat16())
    assert score.shape == (400,)
    assert score.dtype == torch.float32
    assert 0 <= float(score.min()) < float(score.max()) <= 1
    assert not any(p.requires_grad for p in probe.parameters())


def test_the_held_out_figures_are_not_those_of_memory() -> None:
    """Labels without any pattern: a network of this size can learn them by heart, and must not be praised for it."""
    hidden, _, question = examples()
    coin = torch.rand(len(hidden), generator=torch.Generator().manual_seed(9)) > 0.5
    assert abs(fit_probe(hidden, coin, question)[1].auc - 0.5) < 0.2


def test_a_fit_repeats_and_leaves_the_global_random_state() -> None:
    hidden, right, question = examples()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = fit_probe(hidden, right, question, seed=4)
    torch.manual_seed(2)
    second = fit_probe(hidden, right, question, seed=4)
    assert first[1] == second[1]
    assert torch.equal(first[0](hidden), second[0](hidden))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.inference_mode(False), torch.no_grad():
        assert fit_probe(hidden, right, question, seed=4)[1] == first[1]


def test_too_few_of_a_kind_are_refused() -> None:
    hidden, right, question = examples()
    with pytest.raises(QwenoptError, match=r"fit_probe: 320 right and 0 wrong examples fitted to, of 40 questions"):
        fit_probe(hidden, torch.ones_like(right), question)
    with pytest.raises(QwenoptError, match="give more questions"):
        fit_probe(hidden[:20], right[:20], question[:20])


def test_area_is_the_share_of_ordered_pairs() -> None:
    scores, right = torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([False, True, False, True])
    assert area(scores, right) == pytest.approx((1 + 0.5 + 1 + 1) / 4)


def test_saved_and_loaded(tmp_path: Path) -> None:
    hidden, right, question = examples()
    probe, _ = fit_probe(hidden, right, question, width=5)
    probe.save(tmp_path / "p.safetensors")
    assert torch.equal(ThinkingProbe.load(tmp_path / "p.safetensors")(hidden), probe(hidden))
    (tmp_path / "q.safetensors").write_bytes(b"no")
    for name in ("q.safetensors", "none.safetensors"):
        with pytest.raises(QwenoptError, match=rf"{name} is no probe: .*needed: a file that ThinkingProbe.save"):
            ThinkingProbe.load(tmp_path / name)
