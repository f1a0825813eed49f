"""Hugging Face continuous batching on our kernels: the tokens of `generate`, what is refused, and one graph for all."""

from __future__ import annotations

import random
from threading import Event
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.utils import is_psutil_available

import qwenopt
from qwenopt import native
from qwenopt.demo.evaluate import prompt_ids
from qwenopt.demo.load import demo_model
from qwenopt.demo.task import unseen_questions
from qwenopt.errors import QwenoptError
from qwenopt.runtime.continuous_batching import NAME, use_continuous_batching
from qwenopt.testing.inductor_code import UNCACHED, copied_pools, inductor_code, pool_calls
from qwenopt.testing.models import tiny_model
from qwenopt.testing.releases import TRANSFORMERS

needs_psutil = pytest.mark.skipif(not is_psutil_available(), reason="transformers sizes its cache through psutil")
NEW_TOKENS = 12


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, 128) for _ in range(length)] for length in lengths]


def tiny(name: str = "0.6B", **changes: Any) -> Any:
    return tiny_model(name, max_position_embeddings=2048, **changes)


def generation(**changes: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0} | changes)


def batching(page_size: int = 16, **changes: Any) -> ContinuousBatchingConfig:
    name = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # the latter up to 5.17
    values = {name: page_size, "num_blocks": 2048 // page_size, "max_batch_tokens": 64}
    return ContinuousBatchingConfig(**values | changes)


def by_generate(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The greedy tokens of each prompt alone, by `model.generate` with attention of transformers."""
    config = generation(eos_token_id=model.generation_config.eos_token_id)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0])
    return [row[len(prompt) :].tolist() for row, prompt in zip(found, prompts, strict=True)]


def by_batches(model: Any, prompts: list[list[int]], **changes: Any) -> list[list[int]]:
    eos = model.generation_config.eos_token_id
    config = generation(eos_token_id=-1 if eos is None else eos)
    found = model.generate_batch(prompts, config, continuous_batching_config=batching(**changes)).values()
    assert not [one.error for one in found if one.error]
    return [one.generated_tokens for one in found]


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@needs_psutil
@pytest.mark.parametrize("page_size", [4, 16, 256])
@pytest.mark.parametrize("name", ["0.6B", "30B-A3B"])
def test_tokens_are_those_of_generate(name: str, page_size: int) -> None:
    model = tiny(name)
    prompts = random_prompts([1, 2, 15, 16, 17, 40, 90, 130, 3, 64, 200, 31])
    wanted = by_generate(model, prompts)
    with use_continuous_batching(model):  # 5 at a time: the others join as those end
        assert by_batches(model, prompts, page_size=page_size, max_requests_per_batch=5) == wanted
    assert len({tuple(row) for row in wanted}) == len(wanted)


def manager(model: Any, **changes: Any) -> Any:
    config = batching(**changes)
    return model.continuous_batching_context_manager(generation(eos_token_id=-1), continuous_batching_config=config)


def results(running: Any, count: int) -> dict[str, list[int]]:
    """The next `count` requests that end, and their tokens; raises what ended the generation, if something did."""
    found: dict[str, list[int]] = {}
    while len(found) < count:
        result = running.get_result(timeout=1)  # however long it takes: a loaded machine is no error
        if result is None and not running.is_running():
            why = running.background_thread_status.fatal_error
            raise AssertionError(f"the generation ended after {found}") from why
        if result is not None:
            assert result.error is None, result.error
            found[result.request_id] = result.generated_tokens
    return found


@needs_psutil
@pytest.mark.parametrize("sharing", [True, False])
def test_a_shared_beginning_is_prefilled_once(sharing: bool) -> None:
    model = tiny()
    start, *ends = random_prompts([70, 1, 2, 9, 20])
    prompts = [start + end for end in ends]
    wanted = by_generate(model, prompts)
    seen: list[int] = []
    counter = model.model.embed_tokens.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    with use_continuous_batching(model), counter, manager(model, allow_block_sharing=sharing) as running:
        for prompt, tokens in zip(prompts, wanted, strict=True):
            request = running.add_request(prompt)
            assert results(running, 1) == {request: tokens}
    total = sum(len(p) + NEW_TOKENS - 1 for p in prompts)
    assert sum(seen) == total - (3 * 64 if sharing else 0)


class Gate:
    """Lets a model make steps only as a test says, so that what happens meanwhile is no matter of time."""

    def __init__(self, model: Any, steps: int) -> None:
        self.steps, self.reached, self.opened = steps, Event(), Event()
        self.hook = model.model.embed_tokens.register_forward_hook(self._step)

    def _step(self, *_: object) -> None:
        self.steps -= 1
        if self.steps == 0:
            self.reached.set()
            assert self.opened.wait(600)

    def open(self) -> None:
        self.opened.set()
        self.hook.remove()


@needs_psutil
def test_requests_join_leave_and_are_cancelled() -> None:
    model = tiny()
    prompts = random_prompts([5, 60, 33, 8, 100])
    wanted = by_generate(model, prompts)
    with use_continuous_batching(model), manager(model) as running:
        joining, leaving = Gate(model, 3), Gate(model, 100)  # the four take some 20 steps, "gone" alone 1500
        running.add_request(prompts[0], request_id="gone", max_new_tokens=1500)
        assert joining.reached.wait(600)
        ids = [running.add_request(p, max_new_tokens=2 + 2 * i) for i, p in enumerate(prompts[1:], 1)]
        joining.open()
        found = results(running, 4)
        running.cancel_request("gone")
        leaving.open()
    assert found == {i: row[: 2 + 2 * n] for n, (i, row) in enumerate(zip(ids, wanted[1:], strict=True), 1)}
    assert running.get_result() is None  # nothing of the one that was cancelled


@needs_psutil
@pytest.mark.skipif(TRANSFORMERS < (5, 18), reason="transformers 5.17 takes no notice of num_return_sequences")
def test_forked_requests() -> None:
    model = tiny()
    prompts = random_prompts([37, 9])
    wanted = by_generate(model, prompts)
    with use_continuous_batching(model):
        config = generation(eos_token_id=-1, num_return_sequences=3, do_sample=True, top_k=1)  # greedy may not fork
        found = model.generate_batch(prompts, config, continuous_batching_config=batching()).values()
    assert [one.generated_tokens for one in found] == [row for row in wanted for _ in range(3)]


@needs_psutil
def test_a_compiled_model_needs_one_graph() -> None:
    model = tiny()
    wanted = by_generate(model, prompts := random_prompts([1, 20, 64, 3, 110]))
    qwenopt.compile(model, lowering="direct", strict=True)
    with use_continuous_batching(model):
        before = graphs()
        assert by_batches(model, prompts) == wanted
        assert graphs() == before + 1
        sites = qwenopt.last_report().graphs[-1].sites
        layers = model.config.num_hidden_layers
        assert [sum(s.op == op for s in sites) for op in ("kv_append", "paged_attention")] == [layers, layers]
        assert by_batches(model, prompts[:1]) == wanted[:1]  # one row, one token, one page
        assert by_batches(model, prompts, max_batch_tokens=7, max_requests_per_batch=2) == wanted
        assert graphs() == before + 1


@needs_psutil
def test_under_inductor_no_pool_is_copied_and_one_graph_serves_every_batch_and_cache() -> None:
    model = tiny(num_hidden_layers=2)
    wanted = by_generate(model, prompts := random_prompts([1, 20, 64, 3, 110]))
    qwenopt.compile(model, strict=True, **UNCACHED)
    with use_continuous_batching(model), inductor_code() as codes:
        assert by_batches(model, prompts) == wanted
        assert by_batches(model, prompts[:1]) == wanted[:1]
        assert by_batches(model, prompts, max_batch_tokens=7, max_requests_per_batch=2, num_blocks=99) == wanted
    (code,) = codes  # no second compile
    assert copied_pools(code) == []
    # Of two layers each; without kernels attention is inlined, and kv_append stays the op that it is.
    assert len(list(pool_calls(code))) == (2 * 2 if native.available() else 2)
    providers = {site.provider for site in qwenopt.last_report().graphs[-1].sites}
    assert providers == {"cpu" if native.available() else "reference"}


@needs_psutil
@pytest.mark.parametrize(
    ("name", "lowering"), [("30B-A3B", None), ("0.6B", None), ("0.6B", "direct"), ("0.6B", "inductor")]
)
def test_a_sliding_window(name: str, lowering: str | None) -> None:
    model = tiny(name, use_sliding_window=True, sliding_window=24, max_window_layers=1)  # of two layers, if it is dense
    prompts = random_prompts([7, 20, 64, 3, 110, 200])
    wanted = by_generate(model, prompts)
    assert wanted != by_generate(tiny(name), prompts)
    before = (getattr(model.config, "layer_types", None), model.config.sliding_window)
    if lowering is not None:
        qwenopt.compile(model, lowering=lowering, strict=True)
    with use_continuous_batching(model):
        assert by_batches(model, prompts, max_requests_per_batch=3) == wanted
    assert (getattr(model.config, "layer_types", None), model.config.sliding_window) == before


@needs_psutil
@pytest.mark.parametrize(
    ("compiled", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.float16)], ids=str
)
def test_the_demo_model(compiled: bool, dtype: torch.dtype) -> None:
    model, tokenizer = demo_model("dense", dtype)
    count = 6 if dtype == torch.float32 else 2
    prompts = [list(prompt_ids(tokenizer, q, i % 2 == 0)) for i, q in enumerate(unseen_questions(count))]
    wanted = by_generate(model, prompts)
    if compiled:
        qwenopt.compile(model, lowering="direct")
    with use_continuous_batching(model):
        assert by_batches(model, prompts, page_size=32) == wanted
    assert bool(qwenopt.last_report().fallbacks) == (compiled and not native.available())


@needs_psutil
def test_the_model_is_given_back() -> None:
    model = tiny()
    (prompt,) = random_prompts([9])
    wanted = by_generate(model, [prompt])
    handle = use_continuous_batching(model)
    assert model.config._attn_implementation == NAME
    with pytest.raises(QwenoptError, match="switched already"):
        use_continuous_batching(model)
    with pytest.raises(QwenoptError, match="outside continuous batching while use_continuous_batching is on"):
        model(torch.tensor([prompt]))
    handle.remove()
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert by_generate(model, [prompt]) == wanted
    assert by_batches(model, [prompt]) == wanted
