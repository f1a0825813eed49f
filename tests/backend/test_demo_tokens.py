"""float32: the shipped trained models give eager's tokens for 256 greedy steps, thinking and not, padded and not."""

from __future__ import annotations

import pytest
import torch

from qwenopt.backend import compile_graph
from qwenopt.demo.evaluate import prompt_ids
from qwenopt.demo.load import DEMO_NAMES, demo_model
from qwenopt.demo.task import unseen_questions
from qwenopt.testing.decode import greedy, one_thread

STEPS = 256


def questions(tokenizer: object, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of unseen questions [batch, S], left-padded, alternately with and without thinking, and their mask."""
    rows = [prompt_ids(tokenizer, q, i % 2 == 0) for i, q in enumerate(unseen_questions(batch))]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DEMO_NAMES)
def test_trained_model_gives_the_tokens_of_eager(name: str, cache: str, batch: int) -> None:
    model, tokenizer = demo_model(name, torch.float32)
    ids, mask = questions(tokenizer, batch)
    with one_thread():
        wanted, _ = greedy(model, model.config, ids, mask if batch > 1 else None, cache=cache, steps=STEPS)
        model.compile(backend=compile_graph, fullgraph=True, options={"lowering": "direct", "strict": True})
        found, _ = greedy(model, model.config, ids, mask if batch > 1 else None, cache=cache, steps=STEPS)
    assert wanted.unique().numel() > 8
    assert torch.equal(found, wanted)
