"""CUDA graphs on a GPU: eager's tokens, nothing captured twice, and what cannot be captured still runs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import qwenopt
from qwenopt.lowering.cuda_graph import Captured
from qwenopt.lowering.cuda_graph_device import graphs_of
from qwenopt.lowering.cuda_graph_inputs import Inputs
from qwenopt.report import Captures
from qwenopt.runtime.thinking import ThinkingConfig
from qwenopt.testing.decode import greedy, prompt
from qwenopt.testing.models import tiny_model

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")


def captures() -> list[Captures]:
    return [g.captures for g in qwenopt.last_report().graphs if g.captures is not None]


@pytest.mark.parametrize("name", ["0.6B", "8B", "30B-A3B"])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_tokens_are_eagers(name: str, cache: str) -> None:
    model: Any = tiny_model(name).to(CUDA)
    ids = prompt(model.config, 2)[0].to(CUDA)
    wanted, gap = greedy(model, model.config, ids, None, cache=cache, steps=40)
    compiled = torch.compile(model.forward, backend="qwenopt", mode="reduce-overhead")
    found, _ = greedy(compiled, model.config, ids, None, cache=cache, steps=40)
    assert gap > 1e-5
    assert torch.equal(found, wanted)
    assert all(g.lowering == "direct" for g in qwenopt.last_report().graphs)
    assert all(c.reason == "" for c in captures())
    if cache == "static":
        assert captures()[-1].graphs == 1
        assert captures()[-1].replays == 37


@pytest.mark.parametrize("thinks", [False, True])
def test_generate_gives_the_tokens_of_the_cpu(thinks: bool) -> None:
    model, tokenizer = qwenopt.demo_model("dense", torch.float32)  # in bfloat16 rounding would choose some tokens
    prompts = [tokenizer(text)["input_ids"] for text in ("1+2", "7", "3*4 =")]
    given: dict[str, Any] = {"max_new_tokens": 40, "seed": 3, "temperature": 0.8, "top_k": 5, "eos_token_id": ()}
    if thinks:
        given |= {"thinking": ThinkingConfig(budget=9), "tokenizer": tokenizer}
    wanted = qwenopt.generate(model, prompts, **given)
    torch.compiler.reset()
    found = qwenopt.generate(model.to(CUDA), prompts, **given)
    assert found.replies == wanted.replies
    assert found.thinking == wanted.thinking
    assert max(c.replays for c in captures()) > 20


def captured(function: Any, kept: int, written: tuple[int, ...]) -> Captured:
    inputs = Inputs(tuple(range(kept)), (kept,), (), open=(kept,), written=written)
    return Captured(function, inputs, graphs_of(CUDA), Captures())


def test_writes_happen_once_and_results_stay() -> None:
    def step(total: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        total.add_(x.sum())
        return total + 0, x * 2

    c, total = captured(step, 1, (0,)), torch.zeros((), device=CUDA)
    results = [c(total, torch.full((i % 2 + 1,), float(i), device=CUDA)) for i in range(12)]
    sums = torch.tensor([i * (i % 2 + 1) for i in range(12)]).cumsum(0)
    assert [int(a) for a, _ in results] == sums.tolist()
    assert all(torch.equal(b.cpu(), torch.full((i % 2 + 1,), 2.0 * i)) for i, (_, b) in enumerate(results))
    assert (c.counts.graphs, c.counts.replays) == (2, 8)


def test_streams_take_turns() -> None:
    c = captured(lambda x: (x @ x,), 0, ())
    x, streams = torch.randn(512, 512, device=CUDA), [torch.cuda.Stream() for _ in range(3)]
    wanted, found = x @ x, []
    torch.cuda.synchronize()
    for i in range(24):
        with torch.cuda.stream(streams[i % 3]):
            found.append(c(x)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(result, wanted) for result in found)


def test_what_reads_back_is_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    c = captured(lambda x: (x * x.sum().item(),), 0, ())
    with caplog.at_level(logging.WARNING, logger="qwenopt"):
        for i in range(5):
            x = torch.full((3,), float(i), device=CUDA)
            assert torch.equal(c(x)[0], x * 3 * i)
    assert len(caplog.records) == 1
    assert c.counts.graphs == 0
    assert torch.randn(3, device=CUDA).isfinite().all()  # the generator draws again
    again = captured(lambda x: (x + 1,), 0, ())
    for i in range(5):  # the device is as it was
        assert torch.equal(again(torch.full((3,), float(i), device=CUDA))[0].cpu(), torch.full((3,), i + 1.0))
    assert again.counts.graphs == 1
