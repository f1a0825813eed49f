"""Plans of a graph with a symbolic number of tokens: one for each number that comes again, with the nodes' bits."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from qwenopt import native
from qwenopt.backend import compile_graph
from qwenopt.graphs import spelling
from qwenopt.lowering import plan, plan_symbols
from qwenopt.lowering.planned import MOST_ONCE, MOST_SIZES, SizedPlanned
from qwenopt.ops.steps import NotPlanned, Size

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native module: {native.why_not()}")


class Wide(nn.Module):
    """Enough products for a plan, a view by the number of tokens, and what makes it a graph of Qwen3's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Qwen3RMSNorm(64)
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(plan.MIN_HEAVY_STEPS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).view(x.shape[0], x.shape[1], 2, 32).flatten(2)
        return self.norm(x)  # type: ignore[no-any-return]


class Compiled:
    """The module compiled for any number of tokens, and the plans in its last graph."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.graphs = module, list[torch.fx.GraphModule]()
        self.call = torch.compile(module, backend=self._backend, dynamic=True, fullgraph=True)

    def _backend(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(gm)
        return compile_graph(gm, inputs, options={"lowering": "direct"})

    def __call__(self, tokens: int) -> torch.Tensor:
        x = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            return self.call(x)  # type: ignore[no-any-return]

    @property
    def planned(self) -> SizedPlanned:
        (found,) = [n.target for n in self.graphs[-1].graph.nodes if isinstance(n.target, plan.Planned)]
        assert isinstance(found, SizedPlanned)
        return found

    def sizes(self) -> tuple[list[int], list[int]]:
        """Tokens that there are plans for, and those that are remembered without one, in order."""
        return [key[-1] for key in self.planned._sized], [key[-1] for key in self.planned._once]


@pytest.fixture
def compiled() -> Compiled:
    torch.compiler.reset()
    torch.manual_seed(0)
    return Compiled(Wide().eval())


def test_a_size_that_comes_again_has_a_plan(compiled: Compiled) -> None:
    for tokens in (9, 5, 7, 5):
        compiled(tokens)
    assert compiled.sizes() == ([9, 5], [7]), "9 is what Dynamo saw"


def test_bits_are_those_of_the_nodes(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (9, 5, 5, 16, 9, 16, 2)
    found = [compiled(tokens) for tokens in sizes]
    assert compiled.sizes() == ([5, 9, 16], [2])
    monkeypatch.setattr(plan, "install", lambda gm, raised: plan.Installed())
    torch.compiler.reset()
    torch.manual_seed(0)
    without = Compiled(Wide().eval())
    for tokens, a in zip(sizes, found, strict=True):
        assert torch.equal(a, without(tokens)), tokens


def test_a_size_that_a_kernel_does_not_take_is_run_node_by_node(compiled: Compiled) -> None:
    for tokens in (9, 33, 33, 33):  # more rows of float32 than `linear` has a kernel for
        wanted = compiled(tokens)
    assert compiled.sizes() == ([9], [33])
    assert torch.equal(compiled(33), wanted)


def test_only_the_last_few_sizes_are_kept(compiled: Compiled) -> None:
    for tokens in range(2, 2 + 2 * MOST_SIZES):
        compiled(tokens)
        compiled(tokens)
    assert compiled.sizes() == (list(range(2 + MOST_SIZES, 2 + 2 * MOST_SIZES)), [])


def test_what_comes_once_pushes_no_plan_out(compiled: Compiled) -> None:
    """Prompts of many lengths between the steps of decoding."""
    for tokens in (16, 16, *range(2, 4 + MOST_ONCE)):
        compiled(tokens)
    assert compiled.sizes() == ([16], list(range(4, 4 + MOST_ONCE)))


def test_each_number_of_threads_has_plans_of_its_own(compiled: Compiled) -> None:
    compiled(9)
    planned, x = compiled.planned, torch.randn(1, 5, 64)
    weights = [layer.weight for layer in compiled.module.layers]
    by_name = {"weight": iter(weights), "x": iter([x])}
    inputs = [
        5 if "Sym" in type(spelling.fake(n)).__name__ else next(by_name["weight" if "weight" in n.name else "x"])
        for n in planned.placeholders
    ]
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 1, 2):
            torch.set_num_threads(count)
            planned(*inputs)
    finally:
        torch.set_num_threads(before)
    made = [(key[0], p.threads) for key, p in planned._sized.items() if key[-1] == 5]
    assert made == [(1, 1), (2, 2)]


def test_sizes_that_no_input_tells_have_no_plan() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    graph = torch.fx.Graph()
    node = graph.placeholder("size")
    node.meta["example_value"] = size = ShapeEnv().create_unbacked_symint()
    assert plan_symbols.hints([node], {size.node.expr}) == {}
    assert plan_symbols.hints([], {size.node.expr}) == {}
    with pytest.raises(NotPlanned, match="not a multiple of a dimension"):
        plan_symbols.Symbols().number(size)


def test_pools_of_another_size_have_the_same_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a run computes decides over its plans; the pages of a pool are a size that is read at each call."""
    import qwenopt
    from qwenopt.testing.models import tiny_model

    torch.compiler.reset()
    model, ids = tiny_model("0.6B"), torch.randint(0, 100, (1, 16))
    planned: dict[int, list[bool]] = {}
    run = SizedPlanned._run
    for pages in (4, 5, 6, 7):  # the first is compiled for itself, the second for any
        seen = planned[pages] = []
        monkeypatch.setattr(
            SizedPlanned, "_run", lambda self, p, *a, s=seen: s.append(p is not None) or run(self, p, *a)
        )
        cache = qwenopt.PagedKVCache(model.config, max_batch_size=1, num_pages=pages, page_size=16)
        qwenopt.generate(model, ids, max_new_tokens=1, temperature=0.0, prefill_tokens=16, cache=cache)
    assert planned[6] == planned[7] == [True]


def test_prompts_are_read_by_plans() -> None:
    """Chunks of one size after another, then the end: the plan of the first chunk serves all but the end."""
    import qwenopt
    from qwenopt.report import last_report
    from qwenopt.testing.models import tiny_model

    torch.compiler.reset()
    model = tiny_model("0.6B")
    ids = torch.randint(0, 100, (1, 40))
    got = qwenopt.generate(model, ids, max_new_tokens=3, temperature=0.0, prefill_tokens=16)
    assert [len(g.plan_steps) for g in last_report().graphs] == [1], "reading and writing on one graph"
    with torch.no_grad():
        wanted = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert got.sequences.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("part", "rows", "offset"),
    [
        (slice(2, -3), -5, 8),
        (slice(None, -1), -1, 0),
        (slice(3, None), -3, 12),
        (slice(None, 3), None, 0),
        (slice(-3, None), None, 0),
        (slice(1, -1, 2), None, 0),
    ],
    ids=str,
)
def test_parts_of_as_many_rows_as_there_are(part: slice, rows: int | None, offset: int) -> None:
    """Rows more than there are in the whole, and the place of the first in it; None: no part of a plan."""
    found: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        recording = plan.Recording({}, 1)
        (node,) = [n for n in gm.graph.nodes if n.target is operator.getitem]
        try:
            recording.add(node)
            found.append(recording.values[node])
        except NotPlanned as error:
            found.append(error)
        return gm.forward

    x = torch.zeros(9, 4)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(lambda x: x[part], backend=backend)(x)
    if rows is None:
        assert "unknown number of rows" in str(found[0]) or "ends are only known" in str(found[0])
    else:
        assert (found[0].shape, found[0].offset) == ((Size(0, 1, rows), 4), offset)
