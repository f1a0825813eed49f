"""Capture a function's graph, raise it and run the raised graph: what a test of one pass needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Captured:
    """The result of a call whose graphs were raised, with the contexts of raising, one for each graph."""

    result: Any = None
    contexts: list[Any] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Raised sites by op over all graphs."""
        return dict(Counter(s.op for c in self.contexts for s in c.sites))

    @property
    def reasons(self) -> list[str]:
        """Why attempts were given up."""
        return [reason for c in self.contexts for found in c.failures.values() for _, reason in found]

    def call(self, op: str, index: int = 0) -> tuple[Any, ...]:
        """Arguments of a raised call node."""
        return tuple([r.node.args for c in self.contexts for r in c.raised if r.op.name == op][index])


def capture(
    fn: Callable[..., Any], *args: Any, disable: tuple[str, ...] = (), verify: bool = False, dynamic: bool | None = None
) -> Captured:
    """Run `fn(*args)` once under torch.compile, raising each graph and running it as it is."""
    from qwenopt.graphs import raise_graph

    captured = Captured()

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured.contexts.append(raise_graph(gm, disable=disable, verify=verify))
        return gm.forward

    with torch.no_grad():
        captured.result = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    return captured
