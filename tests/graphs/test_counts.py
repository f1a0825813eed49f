"""Exactly what is raised: per kind of model, cache, dtype and phase, without a miss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qwenopt
from qwenopt.backend import compile_graph
from qwenopt.testing.decode import CACHES, make_cache, one_thread, prompt
from qwenopt.testing.models import tiny_model

LAYERS = 2
DENSE_COUNTS = {
    "attention": LAYERS,
    "qk_norm_rope": LAYERS,
    "silu_mul": LAYERS,
    "rms_norm": 1,
    "add_rms_norm": 2 * LAYERS,
    "linear": 7 * LAYERS + 1,
}
MOE_COUNTS = {
    "attention": LAYERS,
    "qk_norm_rope": LAYERS,
    "moe_route": LAYERS,
    "moe_experts": LAYERS,
    "rms_norm": 1,
    "add_rms_norm": 2 * LAYERS,
    "linear": 5 * LAYERS + 1,
}


def raised(model: torch.nn.Module, cache: str, batch: int = 1, **options: Any) -> list[qwenopt.Report]:
    """Reports of the prefill and, where there is a cache, of the decode step."""
    ids, mask = prompt(model.config, batch)
    state = make_cache(cache, model.config, 32)
    how: dict[str, Any] = {"use_cache": False} if state is None else {"past_key_values": state}
    if mask is not None:
        how["attention_mask"] = mask
    with one_thread():
        reports = [qwenopt.explain(model, ids, options={"lowering": "direct"} | options, **how)]
        if state is not None:
            if mask is not None:
                how["attention_mask"] = torch.cat((mask, mask[:, :1] | 1), 1)
            reports.append(qwenopt.explain(model, ids[:, :1], options={"lowering": "direct"} | options, **how))
    return reports


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_graphs_are_raised_whole(dtype: torch.dtype, cache: str) -> None:
    for report in raised(tiny_model("4B", dtype), cache):
        assert report.counts == DENSE_COUNTS
        assert report.misses == []
        assert len(report.graphs) == 1


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moe_graphs_are_raised_whole(dtype: torch.dtype, experts: str, cache: str) -> None:
    model = tiny_model("30B-A3B", dtype)
    model.set_experts_implementation(experts)
    for report in raised(model, cache):
        assert report.counts == MOE_COUNTS
        assert report.misses == []
        assert len(report.graphs) == 1


def test_eager_experts_are_switched_and_raised() -> None:
    model = tiny_model("30B-A3B")
    model.set_experts_implementation("eager")
    (report,) = raised(model, "none")
    assert report.counts == MOE_COUNTS


def test_routing_weights_that_are_not_normalised_are_raised() -> None:
    (report,) = raised(tiny_model("30B-A3B", norm_topk_prob=False), "none")
    assert report.counts == MOE_COUNTS
    assert report.misses == []


def test_dense_layers_of_a_moe_model_are_raised() -> None:
    (report,) = raised(tiny_model("30B-A3B", mlp_only_layers=[0]), "none")
    assert report.counts["silu_mul"] == report.counts["moe_experts"] == report.counts["moe_route"] == 1
    assert report.counts["linear"] == 7 + 5 + 1


def test_attention_biases_are_raised_with_their_linears() -> None:
    (report,) = raised(tiny_model("0.6B", attention_bias=True), "none")
    assert report.counts == DENSE_COUNTS


def test_padded_batches_are_raised_whole_and_keep_their_mask() -> None:
    for report in raised(tiny_model("0.6B"), "static", batch=3):
        assert report.counts == DENSE_COUNTS
        assert {s.note for s in report.sites if s.op == "attention"} == {"mask honoured, invisible blocks skipped"}


def test_static_cache_decode_reads_only_the_keys_present() -> None:
    _, decode = raised(tiny_model("0.6B"), "static")
    notes = {s.note for s in decode.sites if s.op == "attention"}
    assert notes == {"causal, proven from the mask: reads only the keys present"}


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "qk_norm_rope", "attention", "silu_mul", "linear"])
def test_disabled_op_is_not_raised_and_is_no_miss(op: str) -> None:
    (report,) = raised(tiny_model("0.6B"), "none", disable=[op])
    assert op not in report.counts
    assert report.misses == []
    expected = {k: n for k, n in DENSE_COUNTS.items() if k != op}
    if op == "rms_norm":
        del expected["add_rms_norm"]  # made from raised norms
    elif op == "add_rms_norm":
        expected["rms_norm"] = 2 * LAYERS + 1
    elif op == "qk_norm_rope":
        expected["rms_norm"] = 1 + 2 * LAYERS  # query and key norms are norms of their own then
    assert report.counts == expected


def test_verify_accepts_every_true_match() -> None:
    for name, wanted in (("0.6B", DENSE_COUNTS), ("30B-A3B", MOE_COUNTS)):
        for report in raised(tiny_model(name, torch.bfloat16), "static", verify=True):
            assert report.counts == wanted


def test_backend_raises_the_same_as_explain() -> None:
    model = tiny_model("0.6B")
    ids, _ = prompt(model.config, 1)
    model.compile(backend=compile_graph, options={"lowering": "direct"})
    with torch.no_grad(), one_thread():
        model(ids, use_cache=False)
    assert qwenopt.last_report().counts == DENSE_COUNTS
