"""kv_append and paged_attention as steps of one plan: the bits of the ops called one by one, in their order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from qwenopt import native
from qwenopt.graphs import Raised
from qwenopt.lowering.plan import Planned
from qwenopt.ops import KV_APPEND, PAGED_ATTENTION
from qwenopt.report import Site
from qwenopt.testing.paged import empty_pools

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native module: {native.why_not()}")
HEADS, GROUPS, DIM, PAGE_SIZE = 4, 2, 64, 16


def step_of_a_layer(inputs: dict[str, Tensor | None], window: int) -> Planned:
    """Append, then attend, as a plan; inputs by the names that the ops give them."""
    graph, nodes = Graph(), {}
    for name, tensor in inputs.items():
        nodes[name] = None if tensor is None else graph.placeholder(name)
        if nodes[name] is not None:
            nodes[name].meta["example_value"] = tensor
    ops = {}

    def call(op: Any, args: tuple[Any, ...]) -> Any:
        values = tuple(a.meta.get("example_value") if isinstance(a, torch.fx.Node) else a for a in args)
        choice = op.choose(values)
        assert choice.provider is not None, choice.reason
        node = graph.call_function(choice.provider.fn, args)
        ops[node] = Raised(op, node, Site(op.name, "layer"), choice.provider)
        return node

    pools = [nodes[name] for name in ("k_pool", "v_pool", "k_scale", "v_scale")]
    call(KV_APPEND, (*pools, nodes["k"], nodes["v"], nodes["slots"]))
    rest = (nodes["block_table"], nodes["q_starts"], nodes["q_positions"], None, window, DIM**-0.5)
    graph.output([call(PAGED_ATTENTION, (nodes["q"], *pools, *rest))])
    return Planned(GraphModule({}, graph), ops, "paged")


def make_inputs(
    lengths: list[int], queries: list[int], dtype: torch.dtype, coded: bool, padding: int = 0
) -> dict[str, Tensor | None]:
    """Rows whose last keys are those that are appended; earlier ones are in the pool."""
    width = max(-(-n // PAGE_SIZE) for n in lengths)
    pages = len(lengths) * width
    pools = empty_pools(pages, GROUPS, PAGE_SIZE, DIM, dtype, coded)
    table = torch.randperm(pages).view(len(lengths), width).to(torch.int32)
    positions, slots = [], []
    for row, (n, new) in enumerate(zip(lengths, queries, strict=True)):
        at = torch.arange(n)
        where = table[row].long()[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
        old = where[: n - new]
        k, v = (torch.randn(1, GROUPS, len(old), DIM).to(dtype) for _ in range(2))
        KV_APPEND.reference(*pools, k, v, old)
        positions.append(at[n - new :])
        slots.append(where[n - new :])
    tokens = sum(queries) + padding
    q, k, v = (torch.randn(1, tokens, h, DIM).to(dtype).transpose(1, 2) for h in (HEADS, GROUPS, GROUPS))
    return {
        **dict(zip(("k_pool", "v_pool", "k_scale", "v_scale"), pools, strict=True)),
        "k": k, "v": v, "slots": torch.cat([*slots, torch.full((padding,), -1)]),
        "q": q, "block_table": table, "q_starts": torch.tensor([0, *queries]).cumsum(0).to(torch.int32),
        "q_positions": torch.cat([*positions, torch.zeros(padding, dtype=torch.int64)]),
    }  # fmt: skip


def copies(inputs: dict[str, Tensor | None]) -> list[Tensor]:
    return [t.clone(memory_format=torch.preserve_format) for t in inputs.values() if t is not None]


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize(("lengths", "queries"), [([70, 33, 1], [1, 1, 1]), ([90, 64, 40], [25, 0, 1])], ids=str)
def test_a_plan_gives_the_bits_of_its_ops(
    lengths: list[int], queries: list[int], window: int, dtype: torch.dtype, coded: bool
) -> None:
    inputs = make_inputs(lengths, queries, dtype, coded, padding=2)
    planned = step_of_a_layer(inputs, window)
    one_by_one, at_once = copies(inputs), copies(inputs)
    (wanted,), (found,) = planned.module(*one_by_one), planned(*at_once)
    assert not wanted.isnan().any()
    assert torch.equal(found, wanted)
    for a, b in zip(at_once, one_by_one, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert [name for name, _ in planned.prepare().steps] == ["kv_append", "paged_attention"]


def test_a_plan_follows_the_values_of_each_run() -> None:
    """Positions, starts, table and slots are read when the plan runs: one plan serves every decode step."""
    inputs = make_inputs([40, 7, 80], [1, 1, 1], torch.float32, False)
    planned = step_of_a_layer(inputs, 0)
    for lengths, queries in (([17, 50, 3], [1, 1, 1]), ([80, 1, 16], [1, 0, 2]), ([79, 80, 80], [3, 0, 0])):
        other = make_inputs(lengths, queries, torch.float32, False)
        if other["block_table"].shape[1] < 5:  # the plan was made for five pages a row
            other["k_pool"], other["v_pool"] = (torch.nn.functional.pad(other[n], [0] * 7 + [15 - len(other[n])])
                                                for n in ("k_pool", "v_pool"))  # fmt: skip
            other["block_table"] = torch.nn.functional.pad(other["block_table"], (0, 5 - other["block_table"].shape[1]))
        one_by_one, at_once = copies(other), copies(other)
        assert planned.prepare().fits(at_once)
        (wanted,), (found,) = planned.module(*one_by_one), planned(*at_once)
        assert torch.equal(found, wanted)


def test_a_wrong_slot_stops_the_plan() -> None:
    inputs = make_inputs([40, 7], [1, 1], torch.float32, False)
    planned = step_of_a_layer(inputs, 0)
    given = copies(inputs)
    before = given[0].clone()
    given[4][1] = 10_000
    with pytest.raises(IndexError, match="kv_append: token 1 goes to slot 10000 of a pool of 96"):
        planned(*given)
    assert torch.equal(given[0].nan_to_num(), before.nan_to_num())
