"""How often a model is compiled: one graph each for prefill and decode, none again as lengths and batches change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from qwenopt.backend import compile_graph
from qwenopt.testing.decode import greedy, make_cache, one_thread, prompt
from qwenopt.testing.models import tiny_model
from qwenopt.testing.tolerance import assert_near_eager

DECODE_STEPS = 64


class Counter:
    """The backend in direct lowering, counting the graphs that it gets."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any], **how: Any) -> Any:
        self.graphs += 1
        return compile_graph(gm, inputs, options={"lowering": "direct"})


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("cache", "most"), [("static", 2), ("dynamic", 3)])
@pytest.mark.parametrize("name", ["0.6B", "30B-A3B"])
def test_prefill_and_decode_take_few_graphs_without_a_break(name: str, cache: str, most: int, batch: int) -> None:
    model, counter = tiny_model(name), Counter()
    model.compile(backend=counter, fullgraph=True)
    ids, mask = prompt(model.config, batch)
    with one_thread():
        greedy(model, model.config, ids, mask, cache=cache, steps=1 + DECODE_STEPS)
    assert counter.graphs <= most


@torch.no_grad()
def test_other_lengths_and_batches_are_not_compiled_again_and_again() -> None:
    model, counter = tiny_model("0.6B"), Counter()
    model.compile(backend=counter, fullgraph=True)
    with one_thread():
        for batch, length in ((2, 7), (3, 9), (4, 12), (5, 13), (6, 30), (7, 31)):
            ids, _ = prompt(model.config, batch, length)
            wanted = model.forward(ids, use_cache=False).logits
            assert_near_eager(model(ids, use_cache=False).logits, wanted)
    assert counter.graphs <= 2


def test_generate_of_a_second_prompt_compiles_little() -> None:
    model, counter = tiny_model("0.6B"), Counter()
    model.compile(backend=counter)
    how = {"do_sample": False, "pad_token_id": 0}
    with one_thread():
        for length, new in ((7, 8), (9, 12), (20, 5), (33, 9)):
            ids, _ = prompt(model.config, 1, length)
            wanted = make_cache("dynamic", model.config, 0)
            assert model.generate(ids, past_key_values=wanted, max_new_tokens=new, **how).shape == (1, length + new)
    assert counter.graphs <= 4


def test_raising_adds_no_graph_to_what_dynamo_needs() -> None:
    model = tiny_model("0.6B")
    ids, _ = prompt(model.config, 1)
    counts = []
    for backend in (CompileCounterWithBackend("eager"), Counter()):
        torch.compiler.reset()
        model.compile(backend=backend)
        with one_thread():
            greedy(model, model.config, ids, None, cache="static", steps=6)
        counts.append(backend.graphs if isinstance(backend, Counter) else backend.frame_count)
    assert counts[1] <= counts[0]
