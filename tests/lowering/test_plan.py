"""Plans of tiny models: one for a decode step, equal bit for bit to the graph without plans, and what stays out."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from qwenopt import native, report
from qwenopt.backend import compile_graph
from qwenopt.lowering import plan
from qwenopt.ops import LINEAR, MOE_EXPERTS
from qwenopt.ops.steps import NotPlanned, Size
from qwenopt.testing.decode import make_cache, positions, prompt
from qwenopt.testing.models import tiny_model

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native module: {native.why_not()}")
MODELS = ["0.6B", "30B-A3B"]
STEPS = 5


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Lowered:
    """A backend that keeps what it made: graphs, the plans in each, and the inputs that each plan was called with."""

    graphs: list[GraphModule] = field(default_factory=list)

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        return compile_graph(gm, inputs, options={"lowering": "direct", "strict": True})

    def plans(self, graph: int = -1) -> list[plan.Planned]:
        nodes = self.graphs[graph].graph.nodes
        return [node.target for node in nodes if isinstance(node.target, plan.Planned)]


@torch.no_grad()
def decode(
    model: Any, cache: str, *, rows: int = 1, counts: tuple[int, ...] = (2,), room: int = 7 + STEPS
) -> tuple[list[Tensor], Lowered]:
    """Logits of a prompt (of several rows all but one padded) and of the next steps, and the keys in the cache."""
    lowered, found = Lowered(), []
    torch.compiler.reset()
    model.compile(backend=lowered, fullgraph=True)
    given, mask = prompt(model.config, rows)
    state = make_cache(cache, model.config, room)
    for i in range(STEPS):
        known = {"past_key_values": state}
        if mask is not None:
            known |= {"attention_mask": mask, "position_ids": positions(mask)[:, -given.shape[1] :]}
            mask = torch.cat((mask, torch.ones(rows, 1, dtype=mask.dtype)), 1)
        with threads(counts[i % len(counts)]):
            found.append(model(given, **known).logits)
        given = found[-1][:, -1:].argmax(-1)
    return [*found, *(layer.keys for layer in state.layers)], lowered


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_a_decode_step_is_one_plan_with_all_linears(name: str, cache: str) -> None:
    _, lowered = decode(tiny_model(name), cache)
    (planned,) = lowered.plans()
    counts = report.last_report().graphs[-1].counts
    steps = [op.op.name for op in planned.ops.values()]
    for op in ("linear", "attention", "moe_experts"):
        assert steps.count(op) == counts.get(op, 0), op
    assert counts["linear"] == 2 * (5 if name == "30B-A3B" else 7) + 1, "two layers and the head"
    kernels = {p.fn for op in (LINEAR, MOE_EXPERTS) for p in op.providers}
    assert not any(node.target in kernels for node in lowered.graphs[-1].graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_results_have_the_bits_of_the_graph_without_plans(
    name: str, cache: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name, dtype)
    found, lowered = decode(model, cache)
    assert lowered.plans()
    monkeypatch.setattr(plan, "install", lambda gm, raised: plan.Installed())
    wanted, without = decode(model, cache)
    assert not without.plans()
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(a, b), f"result {i}"


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_padded_rows_have_a_plan(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their mask is computed in the graph; beside a growing cache its strides are known at run time only."""
    model = tiny_model("0.6B")
    found, lowered = decode(model, cache, rows=3)
    (planned,) = lowered.plans()
    assert [op.op.name for op in planned.ops.values()].count("attention") == 2
    (made,) = planned._plans.values()
    assert any(isinstance(n, Size) for _, strides in made.expected_strides for n in strides) == (cache == "dynamic")
    monkeypatch.setattr(plan, "install", lambda gm, raised: plan.Installed())
    wanted, _ = decode(model, cache, rows=3)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_thread_count_may_change_between_calls(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, counts = tiny_model("0.6B"), (2, 2, 1, 4, 1)
    found, lowered = decode(model, cache, counts=counts)
    made = [planned.prepare() for i in range(len(lowered.graphs)) for planned in lowered.plans(i)]
    assert made
    monkeypatch.setattr(plan, "install", lambda gm, raised: plan.Installed())
    wanted, _ = decode(model, cache, counts=counts)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.fixture
def last_call(monkeypatch: pytest.MonkeyPatch) -> tuple[plan.Planned, list[Tensor]]:
    """The plan of a decode step of a dynamic cache, which writes to none of its inputs, and those of one call."""
    calls: list[list[Tensor]] = []
    with monkeypatch.context() as m:
        call = plan.Planned.__call__
        m.setattr(plan.Planned, "__call__", lambda self, *t: (calls.append([*t]), call(self, *t))[1])
        _, lowered = decode(tiny_model("0.6B"), "dynamic")
    return lowered.plans()[0], calls[-1]


def test_each_thread_count_has_a_plan(last_call: tuple[plan.Planned, list[Tensor]]) -> None:
    planned, inputs = last_call
    for count in (1, 2, 4, 2):
        with threads(count):
            found, wanted = planned(*inputs), planned.module(*inputs)
            made = planned.prepare()
        assert made.threads == count
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert set(planned._plans) == {1, 2, 4}


def apart(x: Tensor) -> Tensor:
    """The same numbers, each followed by another."""
    other = torch.full_like(x, torch.nan if x.is_floating_point() else 0)
    return torch.stack((x, other), -1)[..., 0]


def test_other_strides_than_foretold_take_the_fallback(
    last_call: tuple[plan.Planned, list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, inputs = last_call
    made, wanted = planned.prepare(), planned(*inputs)
    assert made.fits(inputs)
    assert made.expected_strides, "tensors that are computed in the graph"
    monkeypatch.setattr(type(made), "__call__", lambda *_: pytest.fail("the plan was called"))
    for i, _ in made.expected_strides:
        x = inputs[i]
        other = [*inputs[:i], apart(x), *inputs[i + 1 :]]
        assert not made.fits(other)
        assert all(torch.equal(a, b) for a, b in zip(planned(*other), wanted, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_forked_child_runs_the_plan_on_threads_of_its_own(
    last_call: tuple[plan.Planned, list[Tensor]], count: int
) -> None:
    planned, inputs = last_call
    with threads(count):
        wanted, made = planned(*inputs), planned.prepare()
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # one that waits for the parent's threads waits for ever
            try:
                same = all(torch.equal(a, b) for a, b in zip(made(inputs), wanted, strict=True))
                os._exit(0 if same else 3)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert all(torch.equal(a, b) for a, b in zip(planned(*inputs), wanted, strict=True)), "the parent, afterwards"


@pytest.mark.parametrize("name", MODELS)
def test_a_static_cache_that_is_too_short_raises(name: str) -> None:
    with pytest.raises(IndexError, match=r"position 9 of a cache of 9; .*: make the cache longer"):
        decode(tiny_model(name), "static", room=9)


# --- Single nodes: what becomes a step, and near misses that do not. ---


def record(fn: Callable[..., Any], *args: Any) -> list[str]:
    """Names of the steps that the nodes of `fn` become; raises NotPlanned for a node that becomes none."""
    names: list[str] = []
    refused: list[NotPlanned] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        recording = plan.Recording({}, 2)
        try:
            for node in gm.graph.nodes:
                if node.op not in ("placeholder", "output"):
                    recording.add(node)
        except NotPlanned as error:
            refused.append(error)
        names.extend(step.name for step in recording.steps.steps)
        return gm.forward

    torch.compile(fn, backend=backend, fullgraph=True, dynamic=False)(*args)
    if refused:
        raise refused[0]
    return names


def rows(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(1, 2, n, 4, dtype=dtype)


ONE, AT = torch.zeros(1, dtype=torch.int64), torch.tensor([1, 0])
STEPS_OF: dict[str, tuple[list[str], Callable[..., Any], tuple[Tensor, ...]]] = {
    "index_copy_": (["move_rows"], lambda x, i, y: x.index_copy_(2, i, y), (rows(5), AT, rows(2))),
    "index_copy_ from the end": (["move_rows"], lambda x, i, y: x.index_copy_(-2, i, y), (rows(5), AT, rows(2))),
    "cat": (["move_rows"] * 2, lambda x, y: torch.cat([x, y], dim=-2), (rows(3), rows(2))),
    "add_": (["advance"], lambda x: x.add_(1), (ONE.clone(),)),
    "arange": (["count_from"], lambda x: torch.arange(3) + x, (ONE.clone(),)),
    "where": (["choose"], torch.where, (AT > 0, AT, AT + 5)),
    "where with a number": (["choose"], lambda c, x: torch.where(c, x, -2), (AT > 0, AT)),
    "rows of a matrix": (["take_rows"], lambda x, i: x[i], (torch.randn(4, 3), AT)),
    "rows of one matrix": (["take_rows"], lambda x, i: x[:, i, :], (torch.randn(1, 4, 3), torch.tensor([3, -1, 0]))),
    "rows that lie apart": (["take_rows"], lambda x, i: x[i], (torch.randn(4, 6)[:, :3], AT)),
    "copy_": (["copy_rows"], lambda x, y: x.copy_(y), (AT.clone(), AT)),
    "copy_ into columns": (["copy_rows"], lambda x, y: x[:, :2].copy_(y), (torch.zeros(4, 3), torch.ones(4, 2))),
}
NEAR: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "index_copy_ of heads": (lambda x, i, y: x.index_copy_(1, i, y), (rows(5), AT, rows(5))),
    "index_copy_ of columns": (lambda x, i, y: x.index_copy_(3, i, y), (rows(5), AT, rows(5)[..., :2].clone())),
    "index_copy_ of a matrix": (lambda x, i, y: x.index_copy_(0, i, y), (torch.zeros(5, 4), AT, torch.ones(2, 4))),
    "index_copy_ of strided positions": (
        lambda x, i, y: x.index_copy_(2, i, y), (rows(5), torch.tensor([1, 9, 0, 9])[::2], rows(2))
    ),
    "rows of several matrices": (lambda x, i: x[:, i, :], (torch.randn(2, 4, 3), AT)),
    "columns": (lambda x, i: x[:, i], (torch.randn(4, 3), AT)),
    "elements of a vector": (lambda x, i: x[i], (torch.randn(4), AT)),
    "rows by several indices": (lambda x, i: x[i], (torch.randn(4, 3), AT[None])),
    "rows by strided indices": (lambda x, i: x[i], (torch.randn(4, 3), torch.tensor([1, 9, 0, 9])[::2])),
    "rows by int32": (lambda x, i: x[i], (torch.randn(4, 3), AT.int())),
    "rows of a transposed matrix": (lambda x, i: x.t()[i], (torch.randn(4, 3), AT)),
    "add_ to floats": (lambda x: x.add_(1), (torch.zeros(1),)),
    "add_ of a float": (lambda x: x.add_(1.0), (torch.zeros(1),)),
    "add_ of a tensor": (lambda x: x.add_(ONE), (ONE.clone(),)),
    "add_ with alpha": (lambda x: x.add_(1, alpha=2), (ONE.clone(),)),
    "add_ to strided counters": (lambda x: x.add_(1), (torch.zeros(6, dtype=torch.int64)[::2],)),
    "where of floats": (torch.where, (AT > 0, AT.float(), AT.float())),
    "where of numbers": (lambda c: torch.where(c, 1, 2), (AT > 0,)),
    "where by ids": (lambda c, x: torch.where(c.bool(), x, 0), (AT, AT)),
    "where of another shape": (torch.where, (torch.ones(2, 2) > 0, AT, AT)),
    "where of strided ids": (torch.where, (AT > 0, torch.zeros(4, dtype=torch.int64)[::2], AT)),
    "copy_ of another dtype": (lambda x, y: x.copy_(y), (AT.clone(), AT.float())),
    "copy_ of one to many": (lambda x, y: x.copy_(y), (AT.clone(), ONE)),
    "copy_ into every other": (lambda x, y: x[::2].copy_(y), (torch.zeros(4), torch.zeros(2))),
    "copy_ of much": (lambda x, y: x.copy_(y), (torch.zeros(1 << 14, 2), torch.zeros(1 << 14, 2))),
    "sum of tensors": (lambda x, y: x + y, (ONE.clone(), ONE.clone())),
    "arange with a start": (lambda x: torch.arange(1, 4) + x, (ONE.clone(),)),
    "arange with a step": (lambda x: torch.arange(0, 4, 2) + x, (ONE.clone(),)),
    "arange of floats": (lambda x: torch.arange(3, dtype=torch.float32) + x, (ONE.clone(),)),
    "arange and several positions": (lambda x: torch.arange(2) + x, (AT,)),
    "arange and a float": (lambda x: torch.arange(3) + x, (torch.zeros(1),)),
    "cat of three": (lambda x, y: torch.cat([x, y, x], dim=-2), (rows(3), rows(2))),
    "cat of one": (lambda x: torch.cat([x], dim=-2), (rows(3),)),
    "cat of heads": (lambda x, y: torch.cat([x, y], dim=1), (rows(3), rows(3))),
    "cat of columns": (lambda x, y: torch.cat([x, y], dim=-1), (rows(3), rows(3))),
    "cat of two dtypes": (lambda x, y: torch.cat([x, y], dim=-2), (rows(3), rows(2, torch.bfloat16))),
    "cat of matrices": (lambda x, y: torch.cat([x, y], dim=-2), (torch.zeros(3, 4), torch.zeros(2, 4))),
    "cat of transposed rows": (
        lambda x, y: torch.cat([x, y], dim=-2), (rows(4).transpose(2, 3), rows(4)[:, :, :2])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS_OF)
def test_becomes_steps(name: str) -> None:
    wanted, fn, args = STEPS_OF[name]
    assert record(fn, *args) == wanted


@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_stays_outside(name: str) -> None:
    fn, args = NEAR[name]
    with pytest.raises(NotPlanned):
        record(fn, *args)
