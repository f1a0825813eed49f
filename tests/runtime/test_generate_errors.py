"""qwenopt.generate: what does not fit is refused before anything runs, and says what would."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from transformers import DynamicCache

import qwenopt
from qwenopt.errors import QwenoptError
from qwenopt.runtime.pages import OutOfPages
from qwenopt.testing.models import tiny_model

GREEDY: dict[str, Any] = {"temperature": 0, "eos_token_id": ()}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("no prompt", {"input_ids": []}, "no prompt; need at least one"),
    ("empty prompt", {"input_ids": [[1], []]}, "prompt 1 is empty"),
    ("token", {"input_ids": [[1, 128]]}, "prompt 0 has token 128; the vocabulary has 0 to 127"),
    ("floats", {"input_ids": torch.ones(1, 3)}, r"input_ids \(1, 3\) torch.float32; need whole numbers"),
    ("mask", {"attention_mask": torch.ones(1, 3)}, r"attention_mask beside a list"),
    (
        "holes",
        {"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.tensor([[1, 0, 1]])},
        "has holes",
    ),
    ("bools", {"input_ids": torch.ones(1, 3, dtype=torch.bool)}, r"input_ids \(1, 3\) torch.bool; need whole numbers"),
    ("parts of ids", {"input_ids": [[1.5]]}, "something else than token ids"),
    ("one list", {"input_ids": [1, 2]}, "something else than token ids .*need lists of ids"),
    (
        "mask of another shape",
        {"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3)},
        r"attention_mask Tensor \(2, 3\) for input_ids \(1, 3\); need a tensor of that shape",
    ),
    (
        "mask of nothing",
        {"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.zeros(1, 3)},
        "empty",
    ),
    ("cache", {"cache": DynamicCache()}, r"cache DynamicCache; need a qwenopt\.PagedKVCache"),
    ("eos", {"eos_token_id": "x"}, "eos_token_id='x'; need a token id, or several"),
    ("True tokens", {"max_new_tokens": True}, "max_new_tokens=True; need a whole number"),
    ("prefill", {"prefill_tokens": 0}, "prefill_tokens=0; need a whole number of at least 1"),
    ("tokens", {"max_new_tokens": 0}, "max_new_tokens=0; need a whole number of at least 1"),
    ("too long", {"max_new_tokens": 600}, "are 603 tokens; the cache takes rows of 512"),
    ("streamer", {"streamer": 3}, "streamer 3; need an object with put and end, or a function"),
]


@pytest.mark.parametrize(("what", "given", "text"), REFUSED, ids=[r[0] for r in REFUSED])
def test_what_does_not_fit_is_refused(what: str, given: dict[str, Any], text: str) -> None:
    model = tiny_model("0.6B")
    call: dict[str, Any] = {"input_ids": [[1, 2, 3]], "max_new_tokens": 4, **GREEDY, **given}
    with pytest.raises(QwenoptError, match=text):
        qwenopt.generate(model, call.pop("input_ids"), **call)


def test_a_cache_that_does_not_fit_is_refused() -> None:
    model = tiny_model("0.6B")
    small = qwenopt.PagedKVCache(model.config, max_batch_size=1, num_pages=2)
    with pytest.raises(OutOfPages, match="prompt 0 and its reply need 3 pages, the cache has 2"):
        qwenopt.generate(model, [[1] * 40], max_new_tokens=5, cache=small, **GREEDY)
    other = qwenopt.PagedKVCache(tiny_model("30B-A3B").config, max_batch_size=1, num_pages=8)
    with pytest.raises(QwenoptError, match="it belongs to another model"):
        qwenopt.generate(model, [[1]], max_new_tokens=5, cache=other, **GREEDY)
    half = qwenopt.PagedKVCache(model.config, max_batch_size=1, num_pages=8, dtype=torch.bfloat16)
    with pytest.raises(QwenoptError, match="made for torch.bfloat16, the model is torch.float32"):
        qwenopt.generate(model, [[1]], max_new_tokens=5, cache=half, **GREEDY)
    window = tiny_model("0.6B", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    slides = qwenopt.PagedKVCache(window.config, max_batch_size=1, num_pages=8)
    with pytest.raises(QwenoptError, match="made for layer_types=.*it belongs to another model"):
        qwenopt.generate(model, [[1]], max_new_tokens=5, cache=slides, **GREEDY)
    elsewhere = qwenopt.PagedKVCache(model.config, max_batch_size=1, num_pages=8, device="meta")
    with pytest.raises(QwenoptError, match="paged cache: on meta, the model on cpu; both must be on one"):
        qwenopt.generate(model, [[1]], max_new_tokens=5, cache=elsewhere, **GREEDY)
    held = qwenopt.PagedKVCache(model.config, max_batch_size=1, num_pages=3)
    row = held.rows.open()
    held.rows.reserve({row: 20})
    with pytest.raises(OutOfPages, match="1 of 3 are free: other rows hold the rest"):
        qwenopt.generate(model, [[1] * 30], max_new_tokens=5, cache=held, **GREEDY)
    assert held.stats().rows == 1


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_pages_of_a_step_that_failed_are_not_found_again(kv_dtype: torch.dtype | None) -> None:
    model = tiny_model("0.6B")
    prompts = [[i % 128 for i in range(3, 53)]]

    def cache() -> qwenopt.PagedKVCache:
        return qwenopt.PagedKVCache(model.config, max_batch_size=1, num_pages=8, kv_dtype=kv_dtype)

    def replies(cache: qwenopt.PagedKVCache) -> list[list[int]]:
        return qwenopt.generate(model, prompts, max_new_tokens=4, cache=cache, **GREEDY).replies

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    broken = cache()
    with mock.patch("qwenopt.runtime.step.Stepper.__call__", fail), pytest.raises(KeyboardInterrupt):
        replies(broken)  # what Ctrl-C in the middle of a step does
    assert (broken.stats().rows, broken.stats().kept) == (0, 0)
    assert replies(broken) == replies(cache())


def test_a_model_that_is_not_captured_is_named() -> None:
    model = tiny_model("0.6B")
    model.model.norm.register_forward_hook(lambda *_: torch._dynamo.graph_break())  # type: ignore[union-attr]
    cache = qwenopt.PagedKVCache(model.config, max_batch_size=1, num_pages=8)
    with pytest.raises(
        QwenoptError, match=r"does not capture a step of Qwen3ForCausalLM as one graph: .*model\.generate"
    ):
        qwenopt.generate(model, [[1, 2, 3]], max_new_tokens=2, cache=cache, **GREEDY)
    assert cache.stats().rows == 0
