"""in-place masked_fill_ and clamp_ on a tensor made in the graph  ->  the same out of place"""

from __future__ import annotations

from torch.fx import Node

from qwenopt.graphs import spelling
from qwenopt.graphs.context import Context, fake_mode
from qwenopt.graphs.storage import Writes, storage_ids

# What transformers (5.8 to 5.22, and expert parallelism later) does to rows that no expert here owns.
_METHODS = {"masked_fill_": "masked_fill", "clamp_": "clamp"}


def functionalize(ctx: Context) -> None:
    """Let readers after the write read its result, so that patterns meet one spelling and nothing is mutated."""
    order = ctx.writes.order
    for node in list(ctx.graph.nodes):
        if node.op != "call_method" or node.target not in _METHODS or not _is_private(node):
            continue
        target = node.args[0]
        assert isinstance(target, Node)  # _is_private saw to it
        args = tuple(spelling.fake(a) for a in node.args)
        kwargs = {k: spelling.fake(a) for k, a in node.kwargs.items()}
        node.target = _METHODS[str(node.target)]
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)
        with fake_mode(args):
            node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if not node.users:
            ctx.graph.erase_node(node)
    ctx.writes = Writes(ctx.graph)


def _is_private(node: Node) -> bool:
    """Whether nothing but the written tensor itself (and the tuple it comes from) lies in the written memory."""
    target = node.args[0]
    if not isinstance(target, Node) or target.op == "placeholder":
        return False
    ids = storage_ids(target)
    allowed = {node, target}
    call = spelling.read(target)
    if call is not None and call.name == "getitem" and isinstance(spelling.fake(call.args["x"]), (tuple, list)):
        allowed.add(call.args["x"])
    return all(n in allowed for n in node.graph.nodes if storage_ids(n) & ids)
