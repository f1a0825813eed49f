"""Decode steps on a GPU: all that belongs together is merged, and a dense layer is nine kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

import qwenopt
from qwenopt import backend, report
from qwenopt.runtime.packed_batch import PackedBatch
from qwenopt.testing.decode import greedy, one_thread, prompt
from qwenopt.testing.fake_cuda import FakeGpu, Launches
from qwenopt.testing.merged import captured, merging_on_the_cpu
from qwenopt.testing.models import build, full_config, tiny_model

LAYERS = 2
BF16 = torch.bfloat16


def packed_step(
    gpu: FakeGpu, plain: nn.Module, rows: int, kv_dtype: torch.dtype | None = None
) -> tuple[Any, Callable[[], Any]]:
    """A decode step of a paged cache."""
    model: Any = gpu.move(plain)
    with gpu.mode:
        sizes: dict[str, Any] = {"max_batch_size": rows, "num_pages": 8, "dtype": BF16, "kv_dtype": kv_dtype}
        batch = PackedBatch(qwenopt.PagedKVCache(model.config, **sizes, device="cuda:0"), rows, rows)
    places = batch.places

    def step() -> Tensor:
        how = {"position_ids": places.positions[None], "attention_mask": batch.masks(), "past_key_values": batch}
        hidden: Tensor = model.model(places.ids[None], **how).last_hidden_state
        return hidden

    return captured(gpu, step)


MOE = {"linear_group": 3 * LAYERS, "linear_add_rms_norm": 2 * LAYERS, "qk_norm_rope_append": 2 * LAYERS}
DENSE = {**MOE, "linear_silu_mul": 3 * LAYERS, "linear_add_rms_norm": 4 * LAYERS}
STATIC = {name: count for name, count in DENSE.items() if name != "qk_norm_rope_append"}
STATIC["qk_norm_rope_static_append"] = LAYERS


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=["plain", "int8"])
@pytest.mark.parametrize(("name", "merged"), [("0.6B", DENSE), ("4B", DENSE), ("30B-A3B", MOE)])
def test_a_paged_step_is_merged(gpu: FakeGpu, name: str, merged: dict[str, int], kv_dtype: torch.dtype | None) -> None:
    graph, _ = packed_step(gpu, tiny_model(name, BF16), 3, kv_dtype)
    assert graph.merged == merged
    assert graph.counts["linear"] == (7 if name != "30B-A3B" else 5) * LAYERS, "counts are of sites, merged or not"
    assert {site.provider for site in graph.sites} == {"triton"}
    assert graph.misses == []
    assert "merged qk_norm_rope_append 4" in graph.line()


LAYER = [
    "group_{}_kernel",
    "qk_norm_rope_append_kernel",
    "flat_kernel",
    "combine_kernel",
    "{}_kernel",
    "add_rms_norm_kernel",
    "gated_{}_kernel",
    "{}_kernel",
    "add_rms_norm_kernel",
]


def layer_of(rows: int) -> list[str]:
    return [kernel.format("gemv" if rows == 1 else "skinny") for kernel in LAYER]


def static_step(gpu: FakeGpu, plain: nn.Module, rows: int) -> tuple[Any, Callable[[], Any]]:
    """A decode step of transformers' static cache."""
    model: Any = gpu.move(plain)
    cache, config = StaticCache(config=model.config, max_cache_len=64), model.config
    with gpu.mode:
        sizes = (rows, config.num_key_value_heads, config.head_dim, BF16, torch.device("cuda:0"))
        cache.early_initialization(*sizes)
    ids = gpu.tensor(torch.zeros(rows, 1, dtype=torch.int64))
    return captured(gpu, lambda: model.model(ids, past_key_values=cache).last_hidden_state)


def kernels_of(gpu: FakeGpu, run: Callable[[], Any]) -> list[str]:
    """What a call starts, from the first layer's projections on."""
    gpu.launched.clear()
    with gpu.mode, Launches(gpu):
        run()
    return gpu.launched[next(i for i, kernel in enumerate(gpu.launched) if kernel.startswith("group_")) :]


@pytest.mark.parametrize("rows", [1, 8])
def test_a_dense_layer_of_a_static_step_is_nine_kernels(gpu: FakeGpu, rows: int) -> None:
    graph, run = static_step(gpu, build(full_config("0.6B", num_hidden_layers=LAYERS, vocab_size=128), BF16), rows)
    assert graph.merged == STATIC
    kernels = kernels_of(gpu, run)
    kernels.remove("_foreach_add_.Scalar")  # the lengths of all layers
    assert kernels == layer_of(rows) * LAYERS


@pytest.mark.parametrize("rows", [1, 8])
def test_a_dense_layer_of_a_paged_step_is_nine_kernels(gpu: FakeGpu, rows: int) -> None:
    """In the true size: there the products of o and down are cut, and nothing is started to add them up."""
    model = build(full_config("0.6B", num_hidden_layers=LAYERS, vocab_size=128), BF16)
    _, run = packed_step(gpu, model, rows)
    assert kernels_of(gpu, run) == layer_of(rows) * LAYERS


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("name", "cache"), [("0.6B", "static"), ("30B-A3B", "static"), ("4B", "dynamic"), ("4B", "none")]
)
def test_merged_steps_give_eagers_tokens(name: str, cache: str, batch: int) -> None:
    model = tiny_model(name)
    ids, mask = prompt(model.config, batch)
    with one_thread(), merging_on_the_cpu():
        wanted, gap = greedy(model, model.config, ids, mask, cache=cache, steps=8)
        report.clear()
        torch.compiler.reset()
        compiled = torch.compile(model.forward, backend="qwenopt", options={"lowering": "direct"}, fullgraph=True)
        found, _ = greedy(compiled, model.config, ids, mask, cache=cache, steps=8)
    assert gap > 1e-4
    assert torch.equal(found, wanted)
    (*_, graph) = qwenopt.last_report().graphs
    linears = {key: count for key, count in (MOE if name == "30B-A3B" else DENSE).items() if key.startswith("linear")}
    assert graph.merged == linears | ({"qk_norm_rope_static_append": LAYERS} if cache == "static" else {})


def test_merged_generation_gives_the_same_tokens() -> None:
    model, _ = qwenopt.demo_model("dense")
    prompts = [torch.arange(3, 3 + n) for n in (4, 9, 1)]
    given: dict[str, Any] = {
        "max_new_tokens": 24,
        "temperature": 0.0,
        "eos_token_id": (),
        "options": {"lowering": "direct"},
    }
    with one_thread():
        wanted = qwenopt.generate(model, prompts, **given)
        model, _ = qwenopt.demo_model("dense")
        report.clear()
        torch.compiler.reset()
        with merging_on_the_cpu():
            found = qwenopt.generate(model, prompts, **given)
    assert torch.equal(found.sequences, wanted.sequences)
    merged = qwenopt.last_report().graphs[-1].merged
    assert {"qk_norm_rope_append", "linear_group"} <= set(merged)
    assert merged["linear_argmax"] == 2, "of lm_head and the choice of a token, neither of which writes logits"


def test_nothing_is_merged_on_the_cpu() -> None:
    report.clear()
    qwenopt.explain(tiny_model("0.6B"), torch.zeros(1, 4, dtype=torch.int64), options={"lowering": "direct"})
    (graph,) = qwenopt.last_report().graphs
    assert graph.merged == {}
    assert "merged" not in graph.line()


@pytest.mark.parametrize("name", sorted(DENSE))
def test_merges_can_be_disabled(gpu: FakeGpu, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_graph = backend.compile_graph
    monkeypatch.setattr(
        backend, "compile_graph", lambda gm, inputs: compile_graph(gm, inputs, options={"disable": [name]})
    )
    graph, _ = packed_step(gpu, tiny_model("0.6B", BF16), 3)
    assert name not in graph.merged
    assert set(graph.merged) >= set(DENSE) - {name, "linear_group"}
