"""What holds with every release of transformers that this is for: `make releases` runs this file with several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qwenopt
from qwenopt import native
from qwenopt.testing.decode import make_cache, prompt
from qwenopt.testing.models import tiny_model
from qwenopt.testing.releases import TRANSFORMERS

# Before 5.8, Dynamo refuses what transformers makes of float32 experts (5.0), or no pattern knows it (5.4, 5.6); before
# 5.15 its bfloat16 experts break the graph, under any backend.
FLOAT32_EXPERTS = pytest.mark.skipif(TRANSFORMERS < (5, 8), reason="float32 experts are rewritten from 5.8 on")
BFLOAT16_EXPERTS = pytest.mark.skipif(TRANSFORMERS < (5, 15), reason="bfloat16 experts are rewritten from 5.15 on")
MODELS = ["0.6B", pytest.param("30B-A3B", marks=FLOAT32_EXPERTS)]
STEPS = 8
GREEDY: dict[str, Any] = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
COUNTS: dict[str, dict[str, int]] = {
    "0.6B": {"qk_norm_rope": 2, "attention": 2, "rms_norm": 1, "add_rms_norm": 4, "silu_mul": 2, "linear": 15},
    "30B-A3B": {
        "qk_norm_rope": 2, "attention": 2, "rms_norm": 1, "add_rms_norm": 4, "moe_route": 2, "moe_experts": 2,
        "linear": 11,
    },
}  # fmt: skip


def check_graphs(name: str) -> None:
    """Every graph since the last reset runs without Inductor on all the ops, and the last is a plan."""
    graphs = qwenopt.last_report().graphs
    assert graphs
    for graph in graphs:
        found = dict(graph.counts)
        found["attention"] = found.pop("attention", 0) + found.pop("paged_attention", 0)
        assert {op: found[op] for op in COUNTS[name]} == COUNTS[name], graph.index
        if native.available():
            assert (graph.lowering, graph.reason) == ("direct", "")
    assert not native.available() or graphs[-1].plan_steps


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("rows", [1, 3])
def test_decoding(name: str, cache: str, rows: int) -> None:
    model = tiny_model(name)
    ids, mask = prompt(model.config, rows)

    def generate() -> Tensor:
        state = make_cache(cache, model.config, ids.shape[1] + STEPS)
        return model.generate(ids, attention_mask=mask, past_key_values=state, **GREEDY)  # type: ignore[operator, no-any-return]

    wanted = generate()
    torch.compiler.reset()
    qwenopt.compile(model)
    assert torch.equal(generate(), wanted)
    check_graphs(name)


def alone(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Each prompt's greedy reply by transformers' own generate, without any other row."""
    return [model.generate(torch.tensor([ids]), **GREEDY)[0, len(ids) :].tolist() for ids in prompts]


@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str) -> None:
    model, prompts = tiny_model(name), [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8]]
    wanted = alone(model, prompts)
    torch.compiler.reset()
    out = qwenopt.generate(model, prompts, max_new_tokens=STEPS, temperature=0, eos_token_id=())
    assert out.replies == wanted
    check_graphs(name)


@BFLOAT16_EXPERTS
@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm"])
def test_bfloat16_experts_are_captured(name: str) -> None:
    """Not compared with eager's tokens, which rounding decides; tests/backend/test_accuracy.py has the errors."""
    model = tiny_model("30B-A3B", torch.bfloat16)
    model.set_experts_implementation(name)  # type: ignore[operator]
    torch.compiler.reset()
    model.compile(backend="qwenopt", fullgraph=True)
    with torch.no_grad():
        model(torch.arange(7)[None], use_cache=False)
    check_graphs("30B-A3B")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_paged_cache_in_transformers_generate(compiled: bool) -> None:
    model, prompts = tiny_model("0.6B"), [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
    wanted = alone(model, prompts)
    cache = qwenopt.PagedKVCache(model.config, max_batch_size=2, num_pages=8)
    torch.compiler.reset()
    if compiled:
        qwenopt.compile(model)
    found = model.generate(  # type: ignore[operator]
        torch.tensor(prompts), past_key_values=cache, **GREEDY
    )
    assert found[:, 5:].tolist() == wanted
    if compiled:
        check_graphs("0.6B")


def test_hf_generate() -> None:
    model = tiny_model("0.6B")
    how: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    wanted = model.generate(ids, **how)  # type: ignore[operator]
    assert torch.equal(model.generate(ids, custom_generate=qwenopt.hf_generate, **how), wanted)  # type: ignore[operator]
