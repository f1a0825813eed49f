"""What Inductor makes of a graph, read: whose memory the ops that write to a pool are given."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

# Of the arguments of each op, those that are pools.
POOLS = {"kv_append": slice(0, 2), "paged_attention": slice(1, 3)}
# What a compile needs for its code to be made anew: `qwenopt.compile(model, **UNCACHED)`.
UNCACHED: dict[str, Any] = {"lowering": "inductor", "fx_graph_cache": False}


@contextmanager
def inductor_code() -> Iterator[list[str]]:
    """A list of the code of each graph that Inductor compiles inside, in any thread."""
    found: list[str] = []
    with mock.patch("torch._inductor.graph.GraphLowering.save_output_code", found.append):
        yield found


def copied_pools(code: str) -> list[str]:
    """The calls of paged ops that are given a copy of a pool: something else than an input of the graph, or a part."""
    calls = list(pool_calls(code))
    assert calls, "no op on a pool in the code"
    return [ast.unparse(call) for call, pools in calls if not all(_name(p).startswith("arg") for p in pools)]


def pool_calls(code: str) -> Iterator[tuple[ast.Call, list[ast.expr]]]:
    """The calls of paged ops and what each is given for its pools."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            for op, where in POOLS.items():
                if ast.unparse(node.func).startswith(f"torch.ops.qwenopt.{op}."):
                    yield node, node.args[where]


def _name(value: ast.expr) -> str:
    while isinstance(value, ast.Call):  # reinterpret_tensor(name, ...)
        value = value.args[0]
    assert isinstance(value, ast.Name), ast.unparse(value)
    return value.id
