"""model.generate(custom_generate=qwenopt.hf_generate): transformers' arguments, this project's loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, MinLengthLogitsProcessor, StoppingCriteriaList
from transformers.generation import MaxTimeCriteria

import qwenopt
from qwenopt.errors import QwenoptError
from qwenopt.testing.decode import one_thread, prompt
from qwenopt.testing.models import tiny_model

HOW: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    torch.compiler.set_stance("force_eager")
    with one_thread():
        yield
    torch.compiler.set_stance("default")


def call(model: Any, batch: int = 3, **changes: Any) -> Any:
    ids, mask = prompt(model.config, batch, 9)
    return model.generate(ids, attention_mask=mask, **{**HOW, **changes})


def test_greedy_is_transformers_own() -> None:
    model = tiny_model("0.6B")
    assert torch.equal(call(model, custom_generate=qwenopt.hf_generate), call(model))
    stop = int(call(model, batch=1)[0, -4])
    found = call(model, custom_generate=qwenopt.hf_generate, eos_token_id=stop)
    assert torch.equal(found, call(model, eos_token_id=stop))


def test_a_paged_cache_and_every_token_are_handed_on() -> None:
    model = tiny_model("0.6B")
    cache = qwenopt.PagedKVCache(model.config, max_batch_size=4, num_pages=8)
    seen: list[tuple[int, int]] = []
    out = call(
        model,
        custom_generate=qwenopt.hf_generate,
        past_key_values=cache,
        on_token=lambda i, token: seen.append((i, token)),
        return_dict_in_generate=True,
    )
    assert isinstance(out.timings.new_tokens, int)
    assert torch.equal(out.sequences, call(model))
    assert [[t for i, t in seen if i == row] for row in range(3)] == out.replies


def test_sampling_is_seeded() -> None:
    model = tiny_model("0.6B")
    how = {"custom_generate": qwenopt.hf_generate, "do_sample": True, "temperature": 1.5, "top_k": 30}
    first, again, other = (call(model, seed=seed, **how) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"num_beams": 2}, "num_beams=2; this loop has none"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True; this loop has none"),
        (
            {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(20, 3)])},
            "the logits processor MinLengthLogitsProcessor has no counterpart",
        ),
        (
            {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(1.0)])},
            "the stopping criterion MaxTimeCriteria has no counterpart",
        ),
    ],
    ids=["beams", "scores", "processor", "criterion"],
)
def test_what_the_loop_does_not_have_is_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(QwenoptError, match=text):
        call(tiny_model("0.6B"), custom_generate=qwenopt.hf_generate, **given)
