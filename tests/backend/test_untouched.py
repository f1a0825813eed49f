"""What is not ours runs as with Inductor: training, autocast, other models; and the report says why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qwenopt
from qwenopt.backend import compile_graph
from qwenopt.testing.decode import one_thread, prompt
from qwenopt.testing.models import tiny_model


def gradients(model: nn.Module, call: Callable[..., Any], ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    call(ids, labels=ids, use_cache=False).loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters()}


@pytest.mark.slow
def test_training_gives_the_gradients_of_inductor() -> None:
    model = tiny_model("0.6B", num_hidden_layers=1).train()
    ids, _ = prompt(model.config, 2)
    with one_thread():
        eager = gradients(model, model.forward, ids)
        wanted = gradients(model, torch.compile(model.forward), ids)
        torch.compiler.reset()
        found = gradients(model, torch.compile(model.forward, backend=compile_graph), ids)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.testing.assert_close(found, eager, rtol=1e-3, atol=1e-4)
    assert qwenopt.last_report().counts == {}
    assert "gradients may flow" in qwenopt.last_report().graphs[0].reason


def reason_of(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """Why a graph was not rewritten, without paying for Inductor."""
    from qwenopt.lowering import inductor

    monkeypatch.setattr(inductor, "compile_untouched", lambda gm, inputs, patches: gm.forward)
    with one_thread():
        call()
    (graph,) = qwenopt.last_report().graphs
    assert graph.sites == []
    assert graph.lowering == "inductor"
    return graph.reason


def compiled_call(model: nn.Module) -> Callable[[], Any]:
    ids, _ = prompt(model.config, 1)
    compiled = torch.compile(model.forward, backend=compile_graph)
    return lambda: compiled(ids, use_cache=False)


def test_graph_with_gradients_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "gradients may flow" in reason_of(compiled_call(tiny_model("0.6B")), monkeypatch)


def test_eval_model_with_gradients_still_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Any] = []
    call = compiled_call(tiny_model("0.6B"))
    reason_of(lambda: results.append(call()), monkeypatch)
    assert results[0].logits.requires_grad


def test_autocast_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    call = compiled_call(tiny_model("0.6B"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert reason_of(call, monkeypatch) == "not rewritten: autocast is on"


def test_autocast_inside_the_model_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("0.6B")
    ids, _ = prompt(model.config, 1)

    def fn() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.forward(ids, use_cache=False).logits

    with torch.no_grad():
        compiled = torch.compile(fn, backend=compile_graph)
        assert reason_of(compiled, monkeypatch) == "not rewritten: autocast inside the graph"


def test_environment_switches_us_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENOPT_DISABLE", "1")
    with torch.no_grad():
        assert reason_of(compiled_call(tiny_model("0.6B")), monkeypatch) == "not rewritten: QWENOPT_DISABLE=1"


class Wrapped(Tensor):
    """A tensor subclass, as quantised weights are."""


def test_tensor_subclass_weights_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return nn.functional.linear(x, w)

    x, w = torch.randn(2, 4), torch.randn(4, 4).as_subclass(Wrapped)
    from qwenopt.eligibility import why_not

    gm = torch.fx.symbolic_trace(fn)
    assert why_not(gm, (x, w)) == "tensor subclass Wrapped"
    assert why_not(gm, (x, nn.Parameter(x, requires_grad=False))) is None


def test_other_device_is_left_alone() -> None:
    from qwenopt.eligibility import why_not

    gm = torch.fx.symbolic_trace(lambda x: x)
    found = why_not(gm, (torch.ones(2, device="meta"),))
    assert found == "graphs on meta are not rewritten in this version"


def plain_model() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 6, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 3)
    )
    return model.eval(), torch.randn(5, 4, 8)


@pytest.mark.slow
def test_other_modules_compile_and_equal_eager() -> None:
    model, x = plain_model()
    with torch.no_grad(), one_thread():
        wanted = model(x)
        found = torch.compile(model, backend=compile_graph)(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    (graph,) = qwenopt.last_report().graphs
    assert (graph.reason, graph.sites, graph.misses) == ("not a Qwen3 graph", [], [])


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.slow
def test_other_language_model_equals_inductor() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 64, (2, 7))
    with torch.no_grad(), one_thread():
        wanted = torch.compile(model.forward)(ids, use_cache=False).logits
        torch.compiler.reset()
        found = torch.compile(model.forward, backend=compile_graph)(ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert [g.reason for g in qwenopt.last_report().graphs] == ["not a Qwen3 graph"]


def test_other_language_model_is_not_rewritten(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    ids = torch.randint(0, 64, (2, 7))
    call = torch.compile(model.forward, backend=compile_graph)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="qwenopt"):
        assert reason_of(lambda: call(ids, use_cache=False), monkeypatch) == "not a Qwen3 graph"
    assert not [r for r in caplog.records if r.name.startswith("qwenopt")]


def test_graph_that_goes_to_inductor_is_the_one_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenopt.lowering import inductor

    kept: list[Any] = []
    monkeypatch.setattr(inductor, "compile_untouched", lambda gm, i, p: kept.append(gm) or gm.forward)
    ids = torch.randint(0, 64, (2, 7))
    with torch.no_grad(), one_thread():
        torch.compile(tiny_llama().forward, backend=compile_graph)(ids, use_cache=False)
    assert not [n for n in kept[0].graph.nodes if "qwenopt" in str(n.target)]
