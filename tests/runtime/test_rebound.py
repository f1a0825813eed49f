"""A compiled call on other tensors: sizes follow where the graph leaves them open, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qwenopt
from qwenopt import native
from qwenopt.lowering.planned import Planned
from qwenopt.runtime.rebound import Call, known_inputs
from qwenopt.testing.decode import one_thread
from qwenopt.testing.models import tiny_model
from qwenopt.testing.replies import prompts_for, wanted


def called(function: Callable[..., Any], *args: Tensor) -> tuple[Callable[..., Any], Call]:
    """What Dynamo makes of a call, and the call."""
    seen: list[tuple[Any, Call]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        known = known_inputs(gm)

        def run(*given: Any) -> Any:
            seen.append((gm.forward, Call(given, known)))
            return gm.forward(*given)

        return run

    torch.compiler.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*args)
    return seen[0]


def scaled(x: Tensor, weight: Tensor) -> Tensor:
    return (x * weight).view(x.shape[0] * 2, -1) * x.shape[0]


def open_rows(*shape: int) -> Tensor:
    x = torch.randn(shape)
    torch._dynamo.mark_dynamic(x, 0)
    return x


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_numbers_follow_the_tensors(rows: int) -> None:
    x, weight, other = open_rows(5, 4), torch.randn(4), torch.randn(rows, 4)
    function, call = called(scaled, x, weight)
    args = call.with_instead({id(x): other})
    assert args is not None
    assert any(isinstance(a, int) for a in args), "the number of rows is an input of its own"
    (found,) = function(*args)
    assert torch.equal(found, scaled(other, weight))


def test_sizes_that_are_not_open_must_stay() -> None:
    x, weight = open_rows(5, 4), torch.randn(4)
    _, call = called(scaled, x, weight)
    assert call.with_instead({}) == call.args
    assert call.with_instead({id(x): torch.randn(3, 6)}) is None
    assert call.with_instead({id(x): torch.randn(3)}) is None
    assert call.with_instead({id(weight): torch.randn(6)}) is None
    _, fixed = called(scaled, torch.randn(5, 4), weight)
    assert fixed.with_instead({id(fixed.args[0]): torch.randn(3, 4)}) is None


def test_two_tensors_of_one_open_size() -> None:
    x, y = open_rows(5, 4), open_rows(5, 4)
    _, call = called(lambda x, y: x + y, x, y)
    assert call.with_instead({id(x): torch.randn(3, 4), id(y): torch.randn(3, 4)}) is not None
    assert call.with_instead({id(x): torch.randn(3, 4)}) is None


@pytest.mark.skipif(not native.available(), reason=f"plans are native: {native.why_not()}")
@pytest.mark.parametrize("rows", [1, 3])
def test_decoding_runs_on_the_graph_that_read_the_prompts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By plans of its own size, all but the first step."""
    model, sizes = tiny_model("0.6B"), list[tuple[int, bool]]()
    run = Planned._run

    def noted(self: Any, plan: Any, inputs: Any, tensors: Any) -> Any:
        sizes.append(
            (max((a for a in inputs if isinstance(a, int)), default=0), plan is not None and plan.fits(tensors))
        )
        return run(self, plan, inputs, tensors)

    monkeypatch.setattr(Planned, "_run", noted)
    prompts = prompts_for(model, [5, 9, 2][:rows])
    torch.compiler.reset()
    with one_thread():
        out = qwenopt.generate(model, prompts, max_new_tokens=8, temperature=0, eos_token_id=())
    assert out.replies == wanted(model, prompts, 8)
    assert len(qwenopt.last_report().graphs) == 1
    lines = 1 << (rows - 1).bit_length()
    assert [planned for size, planned in sizes if size == lines] == [False] + [True] * 6


def test_inductors_functions_are_not_called_so() -> None:
    """They are compiled for the sizes that Dynamo has guards for."""
    model = tiny_model("0.6B", num_hidden_layers=1)
    prompts = prompts_for(model, [5, 9])
    torch.compiler.reset()
    with one_thread():
        out = qwenopt.generate(
            model, prompts, max_new_tokens=3, temperature=0, eos_token_id=(), options={"lowering": "inductor"}
        )
    assert out.replies == wanted(model, prompts, 3)
    assert len(qwenopt.last_report().graphs) == 2
