"""Decode steps on a GPU, as far as that goes without one: a stand-in replays them, and fake tensors trace them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import qwenopt
from qwenopt import backend, report
from qwenopt.lowering import inductor
from qwenopt.lowering.cuda_graph import Captured
from qwenopt.runtime.packed_batch import PackedBatch
from qwenopt.runtime.sample import SamplingParams
from qwenopt.runtime.step import Stepper
from qwenopt.runtime.tail import Choices
from qwenopt.runtime.thinking import ThinkingConfig
from qwenopt.runtime.thinking_exits import EntropyRule, MarginRule
from qwenopt.runtime.thinking_tokens import ThinkingTokens
from qwenopt.testing.decode import greedy, one_thread, prompt
from qwenopt.testing.fake_cuda import FakeGpu, HostReads, allow_cuda_views, fake_gpu
from qwenopt.testing.models import tiny_model
from qwenopt.testing.replayed import CapturingBackend, ReplayedGraphs


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> CapturingBackend:
    """What `qwenopt.generate` compiles with, in place of the backend."""
    made = CapturingBackend()
    made.reset = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr("torch._dynamo.backends.registry.lookup_backend", lambda name: made)
    return made


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    assert allow_cuda_views() is None
    with fake_gpu() as fake:
        yield fake


@pytest.mark.parametrize("name", ["0.6B", "30B-A3B"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_replayed_step_gives_eagers_tokens(name: str, batch: int) -> None:
    model, made = tiny_model(name), CapturingBackend()
    ids, _ = prompt(model.config, batch)
    with one_thread():
        wanted, gap = greedy(model, model.config, ids, None, cache="static", steps=10)
        compiled = torch.compile(model.forward, backend=made, fullgraph=True)
        found, _ = greedy(compiled, model.config, ids, None, cache="static", steps=10)
    assert gap > 1e-4
    assert torch.equal(found, wanted)
    assert made.refused == []
    assert [c.counts.replays for c in made.captured][-1:] == [7], "of nine decode steps, two come before the capture"


def test_generate_is_the_same_when_its_steps_are_replayed(
    capturing: CapturingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = qwenopt.demo_model("dense")
    prompts = [tokenizer(text)["input_ids"] for text in ("1+2", "7", "3*4 =")]
    given: dict[str, Any] = {"max_new_tokens": 24, "seed": 3, "temperature": 0.8, "top_k": 5, "eos_token_id": ()}
    given |= {"thinking": ThinkingConfig(budget=9, exits=[MarginRule(), EntropyRule()]), "tokenizer": tokenizer}
    with one_thread():
        found = qwenopt.generate(model, prompts, **given)
        monkeypatch.undo()
        wanted = qwenopt.generate(model, prompts, **given, options={"lowering": "direct"})
    assert found.replies == wanted.replies
    assert found.thinking == wanted.thinking
    assert sum(c.counts.replays for c in capturing.captured) > 10
    for c in capturing.captured:
        assert c.inputs.copied == (), "every tensor of a step stays where it is"


def lowered(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, run: Callable[[Callable[..., Any]], object]
) -> tuple[Any, Any]:
    """What the backend makes of a call on a fake GPU, and the arguments that Dynamo gives it."""
    report.clear()
    calls: list[Any] = []
    graphs = ReplayedGraphs()
    monkeypatch.setattr(backend, "graphs_of", lambda device: graphs)
    monkeypatch.setattr(Captured, "__call__", lambda self, *args: calls.append((self, args)) or self.function(*args))
    monkeypatch.setattr(inductor, "compile_untouched", lambda gm, inputs, patches: gm.forward)
    with gpu.mode:
        run(lambda gm, inputs, **_: backend.compile_graph(gm, inputs, mode="reduce-overhead"))
    ((captured, args),) = calls
    return captured, args


@pytest.mark.parametrize("name", ["0.6B", "30B-A3B"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_graph_on_a_gpu_is_captured_whole(
    gpu: FakeGpu, name: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import StaticCache

    model: Any = gpu.move(tiny_model(name, torch.bfloat16))
    config, cache = model.config, StaticCache(config=model.config, max_cache_len=64)
    ids = gpu.tensor(torch.zeros(1, tokens, dtype=torch.int64))

    def run(made: Any) -> Tensor:
        sizes = (1, config.num_key_value_heads, config.head_dim, torch.bfloat16, torch.device("cuda:0"))
        cache.early_initialization(*sizes)
        return torch.compile(model.forward, backend=made, fullgraph=True)(ids, past_key_values=cache).logits

    captured, args = lowered(gpu, monkeypatch, run)
    (graph,) = qwenopt.last_report().graphs
    assert (graph.lowering, graph.reason, graph.misses) == ("direct", "", [])
    assert {s.provider for s in graph.sites} == {"triton"}
    assert len(captured.inputs.copied) == 1, "the ids"
    assert captured.inputs.host == ()
    with gpu.mode, HostReads() as reads:
        captured.function(*args)
    assert reads.found == []


SAMPLING = {
    "greedy": SamplingParams(temperature=0.0),
    "drawn": SamplingParams(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1),
    "penalties": SamplingParams(temperature=0.6, top_k=20, repetition_penalty=1.1, presence_penalty=0.5),
    "all": SamplingParams(temperature=0.6),
}


@pytest.mark.parametrize(
    ("sampling", "thinks"), [("greedy", False), ("drawn", True), ("penalties", True), ("all", False)]
)
def test_a_step_of_generate_reads_nothing_back(
    gpu: FakeGpu, sampling: str, thinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = qwenopt.demo_model("dense")
    vocab = model.config.vocab_size
    configs = [ThinkingConfig(budget=9, exits=[MarginRule(), EntropyRule()])] * 2 if thinks else None
    tokens = ThinkingTokens.of(tokenizer, vocab_size=vocab, eos_token_id=[0]) if thinks else None
    choices = Choices(SAMPLING[sampling], configs, tokens, 2, vocab, torch.device("cpu"))
    moved: Any = gpu.move(model.to(torch.bfloat16))
    gpu.move(choices.tail)

    def run(made: Any) -> None:
        monkeypatch.setattr("torch._dynamo.backends.registry.lookup_backend", lambda name: made)
        made.reset = lambda: None
        sizes: dict[str, Any] = {"max_batch_size": 2, "num_pages": 8, "dtype": torch.bfloat16, "device": "cuda:0"}
        batch = PackedBatch(qwenopt.PagedKVCache(moved.config, **sizes), 2, 2)
        emits, out = (torch.zeros(2, dtype=dtype, device="cuda:0") for dtype in (torch.bool, torch.int64))
        Stepper(moved, choices.tail, {})(batch, emits, out)

    captured, args = lowered(gpu, monkeypatch, run)
    (graph,) = qwenopt.last_report().graphs
    assert (graph.lowering, graph.misses) == ("direct", [])
    others = {s.op for s in graph.sites if s.provider != "triton"}
    assert others == ({"top_tokens"} if sampling == "all" else set()), "the whole vocabulary in order is torch's sort"
    with gpu.mode, HostReads() as reads:
        captured.function(*args)
    assert reads.found == []


def test_reads_are_seen(gpu: FakeGpu) -> None:
    x = gpu.tensor(torch.ones(3))
    with gpu.mode, HostReads() as reads:
        x * torch.tensor(2.0)
        assert reads.found == []
        x.cpu()
        torch.tensor([1, 2]).to("cuda:0")
        torch.tensor(1).to("cuda:0")
        assert len(reads.found) == 3
        with pytest.raises(RuntimeError, match="data.dependent|scalar"):
            x.sum().item()
