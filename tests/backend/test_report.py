"""Never silent: reports, logs, warnings, strict mode, and what they say of fallbacks and misses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qwenopt
from qwenopt import native
from qwenopt.backend import compile_graph
from qwenopt.errors import QwenoptError
from qwenopt.lowering import inductor
from qwenopt.testing.decode import greedy, make_cache, one_thread, prompt
from qwenopt.testing.models import tiny_model
from qwenopt.testing.tolerance import assert_near_eager


@torch.no_grad()
def run(model: nn.Module, **options: Any) -> tuple[Any, Any]:
    """Logits of eager and of the compiled model."""
    ids, _ = prompt(model.config, 1)
    with one_thread():
        wanted = model.forward(ids, use_cache=False).logits
        compiled = torch.compile(model.forward, backend=compile_graph, options={"lowering": "direct"} | options)
        return wanted, compiled(ids, use_cache=False).logits


def test_auto_is_direct_where_kernels_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "compile_untouched", lambda gm, i, p: gm.forward)
    for name in ("0.6B", "30B-A3B"):
        torch.compiler.reset()
        run(tiny_model(name), lowering="auto")
        (graph,) = qwenopt.last_report().graphs
        if native.why_not() is None:
            assert (graph.lowering, graph.reason) == ("direct", "")
            assert {s.provider for s in graph.sites} == {"cpu"}
        else:
            assert graph.lowering == "inductor"
            assert str(native.why_not()) in graph.reason


def test_heavy_node_left_over_sends_auto_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "compile_untouched", lambda gm, i, p: gm.forward)
    run(tiny_model("0.6B"), lowering="auto", disable=["linear"])
    if native.why_not() is None:
        assert "heavy nodes not raised: linear" in qwenopt.last_report().graphs[-1].reason


def test_logs_one_line_for_each_graph(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qwenopt"):
        run(tiny_model("0.6B"))
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("qwenopt") and r.levelno == logging.INFO]
    assert "attention 2" in line
    assert "lowering direct" in line


def test_reset_forgets_the_reports() -> None:
    run(tiny_model("0.6B"))
    assert qwenopt.last_report().counts["attention"] == 2
    torch.compiler.reset()
    assert qwenopt.last_report().graphs == []


def test_reset_forgets_the_reports_of_explain() -> None:
    model = tiny_model("0.6B", num_hidden_layers=1)
    ids, _ = prompt(model.config, 1)
    qwenopt.explain(model, ids, use_cache=False, options={"lowering": "direct"})
    torch.compiler.reset()
    assert qwenopt.last_report().graphs == []


def test_reports_are_bounded() -> None:
    from qwenopt import report

    for i in range(1000):
        report.record(report.GraphReport(i))
    assert len(qwenopt.last_report().graphs) < 1000
    assert qwenopt.last_report().graphs[-1].index == 999


def test_explain_reports_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model("0.6B")
    ids, _ = prompt(model.config, 1)
    report = qwenopt.explain(model, ids, use_cache=False, options={"lowering": "direct"})
    assert report.counts["attention"] == 2
    assert model._compiled_call_impl is None
    assert "attention 2" in str(report)
    modules = [s.module for s in report.sites if s.op == "attention"]
    assert modules == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_explain_can_be_asked_any_number_of_times() -> None:
    model = tiny_model("0.6B", num_hidden_layers=1)
    ids, _ = prompt(model.config, 1)
    with one_thread():
        for _ in range(10):
            report = qwenopt.explain(model, ids, use_cache=False, options={"lowering": "direct"})
            assert report.counts.get("attention") == 1


def test_explain_of_a_compiled_model_reports_too() -> None:
    model = tiny_model("0.6B", num_hidden_layers=1)
    ids, _ = prompt(model.config, 1)
    model.compile(backend=compile_graph, options={"lowering": "direct"})
    with torch.no_grad(), one_thread():
        model(ids, use_cache=False)
        report = qwenopt.explain(model, ids, use_cache=False, options={"lowering": "direct"})
    assert report.counts["attention"] == 1


def test_report_is_written_as_json_and_html(tmp_path: Path) -> None:
    for name in ("r.json", "r.html"):
        torch.compiler.reset()
        run(tiny_model("0.6B", num_hidden_layers=1), report=str(tmp_path / name))
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["counts"] == qwenopt.last_report().counts
    assert data["graphs"][0]["lowering"] == "direct"
    page = (tmp_path / "r.html").read_text()
    assert "model.layers.0.self_attn" in page
    assert "&lt;" not in page or "<graph>" not in page
    qwenopt.last_report().to_html(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page


def test_report_that_cannot_be_written_does_not_stop_the_model(tmp_path: Path) -> None:
    wanted, found = run(tiny_model("0.6B", num_hidden_layers=1), report=str(tmp_path / "missing" / "r.json"))
    assert_near_eager(found, wanted)


def test_names_in_the_report_are_escaped(tmp_path: Path) -> None:
    from qwenopt.report import GraphReport, Miss, Report

    Report([GraphReport(0, misses=[Miss("linear", "<b>", "a & b")])]).to_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "&lt;b&gt;" in page
    assert "a &amp; b" in page


class Qwen3Odd(nn.Module):
    """Named like a module of ours, but nothing in it is what its name says."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean()


class Qwen3OddRMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.norm(dim=-1, keepdim=True)


def test_graph_of_ours_that_matches_nothing_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inductor, "compile_untouched", lambda gm, i, p: gm.forward)
    model, x = nn.Sequential(Qwen3Odd(), Qwen3OddRMSNorm()), torch.randn(3, 4)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="qwenopt"):
        found = torch.compile(model, backend=compile_graph)(x)
    torch.testing.assert_close(found, model(x))
    (record,) = [r for r in caplog.records if r.name.startswith("qwenopt")]
    assert "nothing in it matched" in record.getMessage()
    (miss,) = qwenopt.last_report().misses
    assert (miss.op, miss.module, miss.reason) == ("rms_norm", "1", "no node that the pattern starts from")


def test_strict_raises_for_a_miss() -> None:
    model, x = nn.Sequential(Qwen3OddRMSNorm()), torch.randn(3, 4)
    compiled = torch.compile(model, backend=compile_graph, options={"strict": True})
    with torch.no_grad(), pytest.raises(Exception, match=r"strict: 1 sites? w\w+ missed: rms_norm at 0") as caught:
        compiled(x)
    error: Any = caught.value
    assert isinstance(error, QwenoptError) or isinstance(error.inner_exception, QwenoptError)


def test_miss_gives_the_module_and_the_reason() -> None:
    model = tiny_model("0.6B")
    model.model.layers[1].mlp.act_fn = nn.GELU()
    wanted, found = run(model)
    assert_near_eager(found, wanted)
    (miss,) = qwenopt.last_report().misses
    assert (miss.op, miss.module) == ("silu_mul", "model.layers.1.mlp")
    assert qwenopt.last_report().counts["silu_mul"] == 1


def test_failure_while_raising_falls_back_or_raises_under_strict(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qwenopt import graphs

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(graphs, "raise_graph", fail)
    monkeypatch.setattr(inductor, "compile_untouched", lambda gm, i, p: gm.forward)
    wanted, found = run(tiny_model("0.6B"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert "raising failed" in qwenopt.last_report().graphs[-1].reason
    assert any("raising failed" in r.getMessage() for r in caplog.records)
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"raising failed: 'surprise'"):
        run(tiny_model("0.6B"), strict=True)


def test_double_precision_runs_on_the_reference_and_says_so() -> None:
    wanted, found = run(tiny_model("0.6B", torch.float64))
    assert torch.equal(found, wanted), "the reference is eager's own arithmetic"
    report = qwenopt.last_report()
    assert len(report.fallbacks) == len(report.sites) > 0
    if native.why_not() is None:
        assert all("float64" in s.fallback for s in report.fallbacks)


def test_head_dim_without_a_kernel_runs_on_the_reference_and_says_so() -> None:
    wanted, found = run(tiny_model("0.6B", head_dim=320, num_attention_heads=4, num_key_value_heads=2))
    assert_near_eager(found, wanted)
    fallbacks = [s for s in qwenopt.last_report().fallbacks if s.op == "attention"]
    assert len(fallbacks) == 2
    if native.why_not() is None:
        assert all("320" in s.fallback for s in fallbacks)


@torch.no_grad()
def test_cache_too_short_for_the_prompt_is_an_error() -> None:
    model = tiny_model("0.6B")
    model.compile(backend=compile_graph, options={"lowering": "direct"})
    ids, _ = prompt(model.config, 1, 9)
    with one_thread(), pytest.raises((RuntimeError, IndexError, ValueError)):
        model(ids, past_key_values=make_cache("static", model.config, 4))


@torch.no_grad()
def test_cache_that_runs_full_is_an_error_and_no_crash() -> None:
    model = tiny_model("0.6B")
    model.compile(backend=compile_graph, options={"lowering": "direct"})
    ids, _ = prompt(model.config, 1, 3)
    with one_thread(), pytest.raises((RuntimeError, IndexError, ValueError)):
        greedy(model, model.config, ids, None, cache="static", steps=6, room=5)


def test_name_of_the_backend_is_registered() -> None:
    from importlib.metadata import entry_points

    if not any(e.name == "qwenopt" for e in entry_points(group="torch_dynamo_backends")):
        pytest.skip("the package is not installed, so torch cannot know the name")
    assert "qwenopt" in torch.compiler.list_backends()
    model = tiny_model("0.6B", num_hidden_layers=1)
    ids, _ = prompt(model.config, 1)
    with torch.no_grad(), one_thread():
        wanted = model(ids, use_cache=False).logits
        assert qwenopt.compile(model, lowering="direct") is model
        assert_near_eager(model(ids, use_cache=False).logits, wanted)
    assert qwenopt.last_report().counts["attention"] == 1
    torch.compiler.reset()
    assert qwenopt.last_report().graphs == []
