"""casts and copies that return their input, and calls that only log, or ask what Dynamo knows  ->  nothing"""

from __future__ import annotations

import torch
from torch.fx import Node

from qwenopt.graphs import spelling
from qwenopt.graphs.context import Context

# Dynamo leaves them in the graph, but acts upon their results while it traces. Experts ask for the capability.
_MEANINGLESS = (torch._C._log_api_usage_once, torch.cuda.get_device_capability)


def canonicalize(ctx: Context) -> None:
    """Remove what does nothing, so that a pattern is written once for all dtypes."""
    for node in list(ctx.graph.nodes):
        if node.target in _MEANINGLESS and not node.users:
            ctx.graph.erase_node(node)
        elif _returns_its_input(node):
            node.replace_all_uses_with(node.args[0])
            ctx.graph.erase_node(node)


def _returns_its_input(node: Node) -> bool:
    """Whether a cast has nothing to cast: PyTorch then returns the very same tensor."""
    call = spelling.read(node)
    if call is None or call.name != "cast" or node.kwargs.get("copy") or "memory_format" in node.kwargs:
        return False
    if any(isinstance(a, bool) for a in node.args[1:]):  # positional non_blocking and copy
        return False
    before, after = spelling.fake(node.args[0]), spelling.fake(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.dtype == after.dtype and before.device == after.device
