"""Numeric self-check: a matched subgraph against the op's reference on random data (option `verify=True`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from qwenopt.graphs import spelling
from qwenopt.ops import Op


def differs(
    op: Op, roots: Sequence[Node], interior: Sequence[Node], args: tuple[Any, ...], seen: dict[Any, str | None]
) -> str | None:
    """Why the subgraph and the reference disagree on random inputs, or None.

    Each distinct site (op, argument shapes and dtypes, constants) is run once; `seen` remembers the verdicts. The
    bound is what rounding alone may do: the results may differ by 8 epsilons of their dtype, relative to the largest
    value, since both sides compute the same expression.
    """
    key = (op.name, tuple(_signature(a) for a in args), tuple(_spelling(n) for n in interior))
    if key not in seen:
        seen[key] = _run(op, roots, interior, args)
    return seen[key]


def _spelling(node: Node) -> Any:
    constants = [a for a in (*node.args, *node.kwargs.items()) if not isinstance(a, Node)]
    return (node.op, str(node.target), repr(constants) if not node.all_input_nodes[1:] else len(node.args))


def _signature(value: Any) -> Any:
    fake = spelling.fake(value)
    return (str(fake.shape), str(fake.stride()), fake.dtype) if isinstance(fake, torch.Tensor) else repr(fake)


def _run(op: Op, roots: Sequence[Node], interior: Sequence[Node], args: tuple[Any, ...]) -> str | None:
    module, inputs = _extract(roots, interior, args)
    generator = torch.Generator().manual_seed(0)
    limit = _id_limit(op, args)
    values = {n: _random(spelling.fake(n), generator, limit) for n in dict.fromkeys([*inputs, *_tensors(args)])}
    with torch.no_grad():
        found = module(*[_clone(values[n]) for n in inputs])
        wanted = op.reference(*[_clone(values[a]) if isinstance(a, Node) else a for a in args])
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for root, a, b in zip(roots, found, wanted, strict=True):
        b = b.reshape(a.shape) if a.shape == b.shape else b.transpose(1, 2)
        if not a.dtype.is_floating_point:
            if not torch.equal(a, b):
                return f"verify: {root.name} differs from the reference in its integers"
            continue
        error = (a.double() - b.double()).abs().max().item()
        bound = 8 * torch.finfo(a.dtype).eps * max(1.0, b.double().abs().max().item())
        if not error <= bound:
            return f"verify: {root.name} differs from the reference by {error:.3g}, more than {bound:.3g}"
    return None


def _extract(roots: Sequence[Node], interior: Sequence[Node], args: tuple[Any, ...]) -> tuple[GraphModule, list[Node]]:
    """The interior as a graph module of its own, and the outside nodes that it takes as inputs.

    What leads from the op's arguments to an input (an unsqueeze, a comparison that makes a mask) is taken along, so
    that both sides start from the same values.
    """
    inside, given = set(interior), set(_tensors(args))
    pending = [a for n in interior for a in n.all_input_nodes]
    while pending:
        node = pending.pop()
        if node not in inside and node not in given and spelling.is_pure(node):
            inside.add(node)
            pending += node.all_input_nodes
    ordered = [n for n in roots[0].graph.nodes if n in inside]
    inputs = list(dict.fromkeys(a for n in ordered for a in n.all_input_nodes if a not in inside))
    graph = Graph()
    copies = {n: graph.placeholder(n.name) for n in inputs}
    for n in ordered:
        copies[n] = graph.node_copy(n, copies.__getitem__)
    graph.output(tuple(copies[r] for r in roots))
    return GraphModule({}, graph), inputs


def _tensors(args: tuple[Any, ...]) -> list[Node]:
    return [a for a in args if isinstance(a, Node)]


def _id_limit(op: Op, args: tuple[Any, ...]) -> int:
    """Exclusive upper bound for random integers: expert ids for moe_experts, positions otherwise."""
    if op.name == "moe_experts":
        return int(spelling.fake(args[3]).shape[0])
    return 4


def _size(n: Any) -> int:
    return n if isinstance(n, int) else int(n.node.hint if n.node.hint is not None else 4)


def _random(value: Any, generator: torch.Generator, limit: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return _size(value)
    shape = [_size(n) for n in value.shape]
    if value.dtype == torch.bool:
        made = torch.ones(shape, dtype=torch.bool)  # nothing hidden: a fully masked row is undefined in eager
    elif value.dtype.is_floating_point:
        made = torch.rand(shape, generator=generator).mul(0.5).add(0.1).to(value.dtype)
    else:
        made = torch.randint(0, limit, shape, generator=generator, dtype=value.dtype)
    return made.to(value.device)


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
