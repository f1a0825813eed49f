"""PagedKVCache as any transformers cache: eager, in `generate`, compiled; errors come before anything is written."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache

import qwenopt
from qwenopt.errors import QwenoptError
from qwenopt.runtime.pages import OutOfPages
from qwenopt.testing.decode import greedy, one_thread, positions, prompt
from qwenopt.testing.inductor_code import UNCACHED, copied_pools, inductor_code
from qwenopt.testing.models import tiny_model

LENGTH, STEPS = 20, 24
GENERATE = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def cache_for(model: Any, rows: int = 4, pages: int = 32, **changes: Any) -> Any:
    return qwenopt.PagedKVCache(model.config, max_batch_size=rows, num_pages=pages, dtype=model.dtype, **changes)


def decode(model: Any, cache: Any, ids: Tensor, mask: Tensor | None, steps: int = STEPS) -> Tensor:
    """Greedy by plain calls of `model`, which may be compiled."""
    found = []
    with torch.no_grad(), one_thread():
        for _ in range(steps):
            kwargs: dict[str, Any] = {}
            if mask is not None:
                kwargs = {"attention_mask": mask, "position_ids": positions(mask)[:, -ids.shape[1] :]}
            ids = model(ids, past_key_values=cache, **kwargs).logits[:, -1:].argmax(-1)
            found.append(ids)
            mask = mask if mask is None else torch.cat((mask, torch.ones_like(ids)), 1)
    return torch.cat(found, 1)


def wanted(model: Any, ids: Tensor, mask: Tensor | None, steps: int = STEPS) -> Tensor:
    with one_thread():
        return greedy(model, model.config, ids, mask, cache="dynamic", steps=steps)[0]


@pytest.mark.parametrize("page_size", [16, 32, 64, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_eager_gives_the_tokens_of_a_dynamic_cache(batch: int, page_size: int) -> None:
    model = tiny_model("0.6B")
    ids, mask = prompt(model.config, batch, LENGTH)
    found = decode(model, cache_for(model, page_size=page_size), ids, mask)
    assert torch.equal(found, wanted(model, ids, mask))


@pytest.mark.parametrize("lowering", ["direct", "inductor"])
@pytest.mark.parametrize("name", ["0.6B", "30B-A3B"])
def test_compiled_gives_the_tokens_of_eager_without_a_gather(name: str, lowering: str) -> None:
    model, batch = tiny_model(name), 3 if lowering == "direct" else 1
    ids, mask = prompt(model.config, batch, LENGTH)
    expected = wanted(model, ids, mask)
    qwenopt.compile(model, fullgraph=True, strict=True, **(UNCACHED | {"lowering": lowering}))
    with inductor_code() as codes:
        assert torch.equal(decode(model, cache_for(model), ids, mask), expected)
    assert [copied_pools(code) for code in codes] == ([[], []] if lowering == "inductor" else [])
    for graph in qwenopt.last_report().graphs:
        assert graph.counts["paged_attention"] == graph.counts["kv_append"] == model.config.num_hidden_layers
        assert "attention" not in graph.counts


def test_model_generate_takes_it() -> None:
    model = tiny_model("0.6B")
    ids, mask = prompt(model.config, 3, LENGTH)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=STEPS, **GENERATE)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=STEPS, past_key_values=cache_for(model), **GENERATE)
    assert torch.equal(found, expected)


def test_model_generate_takes_it_compiled_with_one_graph_for_decoding() -> None:
    model = tiny_model("0.6B")
    ids, mask = prompt(model.config, 3, LENGTH)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=STEPS, **GENERATE)
    qwenopt.compile(model, fullgraph=True)
    for _ in range(2):
        found = model.generate(
            ids, attention_mask=mask, max_new_tokens=STEPS, past_key_values=cache_for(model), **GENERATE
        )
        assert torch.equal(found, expected)
    assert len(qwenopt.last_report().graphs) == 2  # the prompt's and the decode step's, for both caches


def test_beams_share_pages() -> None:
    model = tiny_model("0.6B")
    ids, mask = prompt(model.config, 2, LENGTH)
    beams = {"num_beams": 3, "max_new_tokens": STEPS, "attention_mask": mask}
    expected = model.generate(ids, **beams, **GENERATE)
    cache = cache_for(model, rows=6)
    assert torch.equal(model.generate(ids, past_key_values=cache, **beams, **GENERATE), expected)
    stats = cache.stats()
    assert stats.shared > 0, stats
    assert stats.used < 6 * 3, stats


def test_crop_takes_tokens_back() -> None:
    model = tiny_model("0.6B")
    ids, _ = prompt(model.config, 1, LENGTH)
    cache = cache_for(model)
    first = decode(model, cache, ids, None, 10)
    assert cache.get_seq_length() == LENGTH + 9
    cache.crop(5 if _crop_removes() else LENGTH + 4)
    assert cache.get_seq_length() == LENGTH + 4
    again = decode(model, cache, first[:, 4:5], None, 5)
    assert torch.equal(again, first[:, 5:])


def _crop_removes() -> bool:
    """What `crop` counts changed between versions of transformers: tokens that go, or (before) that stay."""
    return "tokens_to_remove" in inspect.signature(Cache.crop).parameters


def test_reset_frees_all_and_int8_holds_a_quarter() -> None:
    model = tiny_model("0.6B", head_dim=32)
    ids, mask = prompt(model.config, 2, LENGTH)
    plain, small = cache_for(model), cache_for(model, kv_dtype=torch.int8)
    for cache in (plain, small):
        decode(model, cache, ids, mask, 4)
        assert cache.stats().used == 4
        assert cache.stats().tokens == 2 * (LENGTH + 3)
        cache.reset()
        assert cache.stats().used == 0
        assert cache.get_seq_length() == 0
        decode(model, cache, *prompt(model.config, 3, LENGTH), 2)  # another batch may follow
    assert small.stats().nbytes == plain.stats().nbytes * (1 + 4 / 32) / 4


def test_int8_is_near_the_model_s_own_values() -> None:
    model = tiny_model("0.6B")
    ids, _ = prompt(model.config, 1, 40)
    with torch.no_grad():
        exact = model(ids).logits
        near = model(ids, past_key_values=cache_for(model, kv_dtype=torch.int8)).logits
    # A code is off by half a step of 1/127 of the largest value at most: 0.4 %, of which little adds up.
    assert (near - exact).abs().max() < 0.03 * exact.abs().max()
    assert not torch.equal(near, exact)


def failing(cache: Any) -> tuple[list[Tensor], Any]:
    """What must not change when a call fails."""
    places = cache.places
    tensors = [t for pools in cache.pools for t in pools if t is not None]
    tensors += [places.block_table, places.slots, places.length]
    return [t.clone() for t in tensors], cache.stats()


def unchanged(before: tuple[list[Tensor], Any], cache: Any) -> bool:
    after = failing(cache)
    return after[1] == before[1] and all(map(torch.equal, after[0], before[0]))


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_out_of_pages_comes_before_anything_is_written(how: str) -> None:
    model = tiny_model("0.6B")
    if how == "compiled":
        qwenopt.compile(model, fullgraph=True)
    ids, _ = prompt(model.config, 2, LENGTH)
    cache = cache_for(model, pages=5)
    decode(model, cache, ids, torch.ones_like(ids), 10)
    before = failing(cache)
    with pytest.raises(OutOfPages, match="4 more pages needed, 1 of 5 are free"):
        decode(model, cache, ids, torch.ones(2, 2 * LENGTH + 9, dtype=torch.int64), 1)
    assert unchanged(before, cache)
    decode(model, cache, ids[:, :1], torch.ones(2, LENGTH + 10, dtype=torch.int64), 1)  # the rows go on


ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("max_batch_size=0", {"rows": 0}, "max_batch_size=0; need a whole number of at least 1"),
    ("num_pages", {"pages": -1}, "num_pages=-1; need a whole number of at least 1"),
    ("page_size", {"page_size": 1.5}, "page_size=1.5; need a whole number of at least 1"),
    ("bool", {"rows": True}, "max_batch_size=True; need a whole number of at least 1"),
    ("max_length", {"max_length": 0}, "max_length=0; need a whole number of at least 1"),
    ("salt", {"salt": "adapter"}, "salt 'adapter'; need bytes"),
    ("kv_dtype", {"kv_dtype": torch.float8_e4m3fn}, "kv_dtype torch.float8_e4m3fn; need torch.int8, or torch.float32"),
]


@pytest.mark.parametrize(("what", "given", "text"), ERRORS, ids=[e[0] for e in ERRORS])
def test_sizes_that_do_not_fit_are_refused(what: str, given: dict[str, Any], text: str) -> None:
    with pytest.raises(QwenoptError, match=text.replace("(", r"\(")):
        cache_for(tiny_model("0.6B"), **given)


def test_what_is_no_config_is_refused() -> None:
    with pytest.raises(QwenoptError, match=r"config Qwen3ForCausalLM; need a model's config, as model\.config"):
        qwenopt.PagedKVCache(tiny_model("0.6B"), max_batch_size=1, num_pages=1)


def test_a_model_with_more_layers_is_refused() -> None:
    model = tiny_model("0.6B")
    ids, _ = prompt(model.config, 1, LENGTH)
    with pytest.raises(QwenoptError, match=r"made for num_hidden_layers=2, called for layer 2: it belongs to another"):
        tiny_model("0.6B", num_hidden_layers=3)(ids, past_key_values=cache_for(model))


def test_what_does_not_fit_the_batch_leaves_it_as_it_was() -> None:
    model = tiny_model("0.6B")
    ids, mask = prompt(model.config, 2, LENGTH)
    cache = cache_for(model, rows=3, pages=4)
    cache.crop(0)  # of no rows
    decode(model, cache, ids, mask, 1)
    cache.batch_select_indices(torch.tensor([1, 1]))  # one full page is shared, a begun one each
    before = failing(cache)
    with pytest.raises(QwenoptError, match=r"50 tokens to remove, more than the rows have"):
        cache.crop(-50)
    with pytest.raises(QwenoptError, match=r"has 20 tokens; it cannot be cut to 17\.5"):
        cache.crop(-2.5)
    for indices in ([2], [-1], [0.0, 1.0], [0, 1, 0, 1]):
        with pytest.raises(QwenoptError, match=r"of a batch of 2; max_batch_size is 3"):
            cache.batch_select_indices(torch.tensor(indices))
    assert unchanged(before, cache)
    cache.batch_select_indices(torch.tensor([], dtype=torch.int64))
    assert (cache.stats().rows, cache.get_seq_length()) == (0, 0)
    assert torch.equal(decode(model, cache, ids, mask, 4), wanted(model, ids, mask, 4))


def test_calls_that_do_not_fit_are_refused() -> None:
    model, other = tiny_model("0.6B"), tiny_model("1.7B")
    ids, _ = prompt(model.config, 1, LENGTH)
    cache = cache_for(model, rows=2)
    before = failing(cache)
    with pytest.raises(QwenoptError, match="it belongs to another model"):
        other(ids, past_key_values=cache)
    with pytest.raises(QwenoptError, match=r"keys of torch.bfloat16, the cache holds torch.float32"):
        tiny_model("0.6B", torch.bfloat16)(ids, past_key_values=cache)
    with pytest.raises(QwenoptError, match="a batch of 3 rows; max_batch_size is 2"):
        model(ids.expand(3, -1), past_key_values=cache)
    with pytest.raises(QwenoptError, match="row 0 would have 600 tokens; a row holds at most 512"):
        model(ids[:, :1].expand(1, 600), past_key_values=cache)
    assert unchanged(before, cache)
    model(ids, past_key_values=cache)
    with pytest.raises(QwenoptError, match="a batch of 2 rows, but 1 are in the cache"):
        model(ids.expand(2, -1), past_key_values=cache)
    with pytest.raises(QwenoptError, match=r"open while a batch of 1 rows is in the cache; reset\(\)"):
        cache.open()


def test_a_batch_beside_opened_rows_is_refused() -> None:
    model = tiny_model("0.6B")
    cache = cache_for(model)
    row = cache.open()
    ids, _ = prompt(model.config, 1, LENGTH)
    with pytest.raises(QwenoptError, match="a batch of 1 rows, while 1 opened rows are in the cache"):
        model(ids, past_key_values=cache)
    cache.free(row)
    model(ids, past_key_values=cache)


def test_pools_stay_where_they_are() -> None:
    model = tiny_model("0.6B")
    cache = cache_for(model)
    tensors = [t for pools in cache.pools for t in pools if t is not None]
    before = [t.data_ptr() for t in tensors]
    ids, mask = prompt(model.config, 3, LENGTH)
    qwenopt.compile(model, fullgraph=True)
    decode(model, cache, ids, mask)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.reset()
    assert [t.data_ptr() for t in tensors] == before
