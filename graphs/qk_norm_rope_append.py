"""kv_append(*pools, qk_norm_rope(q, k, ...)[1], v, slots)  ->  qwenopt::qk_norm_rope_append"""

from __future__ import annotations

from torch.fx import Node

from qwenopt.graphs.merging import Merging, items
from qwenopt.ops import KV_APPEND, QK_NORM_ROPE, QK_NORM_ROPE_APPEND


def merge_qk_norm_rope_append(merging: Merging) -> None:
    """Merge the rotation of keys with their way into a paged cache, if nobody else wants them."""
    for append in merging.of(KV_APPEND):
        *pools, keys, v, slots = append.node.args
        rope = merging.raised_as(QK_NORM_ROPE, keys.args[0] if isinstance(keys, Node) and keys.args else None)
        if rope is None:
            continue
        queries = items(rope.node).get(0)
        if queries is not None and items(rope.node).get(1) is keys:
            args = (*rope.node.args, *pools, v, slots)
            merging.replace(QK_NORM_ROPE_APPEND, (rope, append), args, {queries: None}, at=append.node)
