"""qwenopt.generate: the tokens of eager, whatever the lengths, the cache and the order; nothing compiled twice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import qwenopt
from qwenopt import native
from qwenopt.testing.decode import one_thread
from qwenopt.testing.models import tiny_model
from qwenopt.testing.replies import prompts_for, wanted

# Without kernels a step is Inductor's, whose functions are compiled for the sizes that Dynamo guards.
GRAPHS = 1 if native.available() else 2
GREEDY: dict[str, Any] = {"temperature": 0, "eos_token_id": ()}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def graphs() -> Iterator[Any]:
    """A function that says how many graphs were compiled since the test began."""
    before = counters["stats"]["unique_graphs"]
    return lambda: counters["stats"]["unique_graphs"] - before


@contextmanager
def eagerly() -> Iterator[None]:
    """What runs inside is not compiled."""
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize("name", ["0.6B", "30B-A3B"])
def test_compiled_gives_the_tokens_of_eager(name: str) -> None:
    model = tiny_model(name)
    prompts = prompts_for(model, [1, 5, 40, 17, 33])
    out = qwenopt.generate(model, prompts, max_new_tokens=20, prefill_tokens=24, **GREEDY)
    assert out.replies == wanted(model, prompts, 20)
    for graph in qwenopt.last_report().graphs:
        assert graph.counts["paged_attention"] == graph.counts["kv_append"] == 2
        assert "attention" not in graph.counts
        assert not graph.misses


@pytest.mark.parametrize("seed", range(6))
def test_any_lengths_any_pieces_any_pages(seed: int) -> None:
    model = tiny_model("0.6B")
    chosen = random.Random(seed)
    rows, size = chosen.randint(1, 16), chosen.choice([16, 32, 64])
    prompts = prompts_for(model, [chosen.choice([1, 2, 16, 17, 60, 130]) for _ in range(rows)], seed=seed)
    prompts += [list(chosen.choice(prompts)) for _ in range(3)]  # some that begin, or are, like others
    prompts.append(prompts[0] + prompts[-1])
    cache = qwenopt.PagedKVCache(
        model.config,
        max_batch_size=chosen.choice([2, 4, 16]),
        num_pages=chosen.randint(512 // size, 40),
        page_size=size,
    )
    with eagerly():
        out = qwenopt.generate(
            model, prompts, max_new_tokens=12, cache=cache, prefill_tokens=chosen.choice([16, 40, 512]), **GREEDY
        )
    assert out.replies == wanted(model, prompts, 12)
    assert cache.stats().used == 0
    assert cache.stats().rows == 0


def test_nothing_is_compiled_again_as_rows_join_and_leave(graphs: Any) -> None:
    model = tiny_model("0.6B")
    chosen = random.Random(1)
    cache = qwenopt.PagedKVCache(model.config, max_batch_size=4, num_pages=64)
    pools = [t.data_ptr() for layer in cache.pools for t in layer if t is not None]
    steps = 0
    while steps < 500:
        prompts = prompts_for(model, [chosen.randint(2, 60) for _ in range(12)], seed=steps)
        out = qwenopt.generate(model, prompts, max_new_tokens=chosen.randint(5, 30), cache=cache, **GREEDY)
        steps += out.timings.decode_steps + out.timings.prefill_steps
        assert graphs() == GRAPHS
    assert [t.data_ptr() for layer in cache.pools for t in layer if t is not None] == pools


def test_caches_and_batches_of_other_sizes_use_the_same_graphs(graphs: Any) -> None:
    model = tiny_model("0.6B")
    for lengths in ([7, 9, 30], [100, 3, 50, 2], [20] * 4):
        qwenopt.generate(model, prompts_for(model, lengths), max_new_tokens=5, **GREEDY)
    assert graphs() == GRAPHS


def test_the_report_of_its_graphs_ends_with_a_reset() -> None:
    qwenopt.generate(tiny_model("0.6B"), [[1, 2, 3]], max_new_tokens=2, **GREEDY)
    assert len(qwenopt.last_report().graphs) == GRAPHS
    torch.compiler.reset()
    assert not qwenopt.last_report().graphs


def test_a_common_beginning_is_computed_once_and_held_once() -> None:
    model = tiny_model("0.6B", max_position_embeddings=2048)
    (common,) = prompts_for(model, [1024])
    prompts = [[*common, i] for i in range(16)]
    cache = qwenopt.PagedKVCache(model.config, max_batch_size=16, num_pages=16 * 66)
    seen = 0

    def watch(index: int, token: int) -> None:
        nonlocal seen
        seen = max(seen, cache.stats().used)

    with eagerly():
        out = qwenopt.generate(model, prompts, max_new_tokens=3, cache=cache, streamer=watch, **GREEDY)
    alone = 16 * 65  # pages of 16 rows that share nothing
    assert seen <= alone / 8
    assert out.timings.shared_tokens == 15 * 1024
    assert out.replies == wanted(model, prompts, 3)


def test_an_ended_row_gives_its_place_to_one_that_waits() -> None:
    model = tiny_model("0.6B")
    prompts = prompts_for(model, [30] * 6)
    cache = qwenopt.PagedKVCache(model.config, max_batch_size=4, num_pages=6)  # three pages for each: two at a time
    with eagerly():
        out = qwenopt.generate(model, prompts, max_new_tokens=8, cache=cache, **GREEDY)
    assert out.replies == wanted(model, prompts, 8)


def test_the_next_call_finds_what_the_last_one_left() -> None:
    model = tiny_model("0.6B")
    (first,) = prompts_for(model, [40])
    cache = qwenopt.PagedKVCache(model.config, max_batch_size=1, num_pages=16)
    with eagerly():
        reply = qwenopt.generate(model, [first], max_new_tokens=10, cache=cache, **GREEDY).replies[0]
        longer = [*first, *reply, 5, 6]
        out = qwenopt.generate(model, [longer], max_new_tokens=10, cache=cache, **GREEDY)
    assert out.timings.shared_tokens == 48  # three full pages of prompt and reply
    assert out.replies == wanted(model, [longer], 10)


def test_a_stop_token_ends_its_row_alone() -> None:
    model = tiny_model("0.6B")
    prompts = prompts_for(model, [5, 9, 12])
    full = wanted(model, prompts, 12)
    stop = full[0][4]
    with eagerly():
        out = qwenopt.generate(model, prompts, max_new_tokens=12, temperature=0, eos_token_id=stop)
    for reply, whole in zip(out.replies, full, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert reply == whole[:end]
    assert out.sequences.shape == (3, 12 + max(map(len, out.replies)))
    assert out.sequences[0, : 12 - 5].eq(0).all()
    assert out.sequences[0, 7:12].tolist() == prompts[0]


def test_padded_input_is_what_model_generate_makes_of_it() -> None:
    model = tiny_model("0.6B")
    ids = torch.tensor(prompts_for(model, [9, 9]))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    with eagerly():
        out = qwenopt.generate(model, ids, mask, max_new_tokens=6, **GREEDY)
    assert torch.equal(out.sequences, expected)


def test_seeded_rows_draw_alike_in_any_company() -> None:
    model = tiny_model("0.6B")
    prompts = prompts_for(model, [5, 30, 9])
    how: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "seed": 7, "eos_token_id": (), "max_new_tokens": 16}
    with eagerly():
        together = qwenopt.generate(model, prompts, prefill_tokens=16, **how).replies
        alone = qwenopt.generate(model, prompts[:1], **how).replies
        other = qwenopt.generate(model, prompts[:1], **{**how, "seed": 8}).replies
    assert together[0] == alone[0] != other[0]


@pytest.mark.slow
def test_any_number_of_kinds_of_sampling_in_turn(graphs: Any) -> None:
    """Each kind has graphs of its own; Dynamo refuses a ninth recompilation of one function, here the first."""
    model, kinds = tiny_model("0.6B"), (0, 1, 3, 4, 20)
    how: dict[str, Any] = {"temperature": 1.0, "seed": 7, "eos_token_id": (), "max_new_tokens": 3}
    with torch._dynamo.config.patch(recompile_limit=1):
        for top_k in kinds:
            qwenopt.generate(model, [[1, 2, 3]], top_k=top_k, **how)
    assert graphs() == GRAPHS * (len(kinds) - 1)  # 3 and 4 share theirs


def test_streaming_shows_every_token_as_it_comes() -> None:
    model = tiny_model("0.6B")
    prompts = prompts_for(model, [5, 9])
    seen: dict[int, list[int]] = {0: [], 1: []}

    class Streamer:
        def __init__(self) -> None:
            self.got: list[list[int]] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.got.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    with eagerly():
        out = qwenopt.generate(
            model, prompts, max_new_tokens=6, streamer=lambda i, token: seen[i].append(token), **GREEDY
        )
        one = qwenopt.generate(model, prompts[:1], max_new_tokens=6, streamer=streamer, **GREEDY)
    assert [seen[0], seen[1]] == out.replies
    assert streamer.got == [prompts[0], *([t] for t in one.replies[0])]
    assert streamer.ended


def test_a_window_is_honoured() -> None:
    changes = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    model = tiny_model("0.6B", **changes)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    prompts = prompts_for(model, [50, 5])
    out = qwenopt.generate(model, prompts, max_new_tokens=12, prefill_tokens=20, **GREEDY)
    assert out.replies == wanted(model, prompts, 12)


def test_yarn_is_transformers_own() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
    model = tiny_model("0.6B", rope_parameters=rope)
    prompts = prompts_for(model, [300, 40])
    with eagerly():
        out = qwenopt.generate(model, prompts, max_new_tokens=8, prefill_tokens=64, **GREEDY)
    assert out.replies == wanted(model, prompts, 8)


def test_a_failing_streamer_leaves_no_row_behind() -> None:
    model = tiny_model("0.6B")
    cache = qwenopt.PagedKVCache(model.config, max_batch_size=2, num_pages=16)

    def stop(index: int, token: int) -> None:
        raise KeyboardInterrupt

    with eagerly(), pytest.raises(KeyboardInterrupt):
        qwenopt.generate(model, prompts_for(model, [5, 9]), max_new_tokens=6, cache=cache, streamer=stop, **GREEDY)
    assert cache.stats().rows == 0
    assert cache.stats().used == 0
