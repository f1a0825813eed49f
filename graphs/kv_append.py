"""qwenopt::kv_append, called by a paged cache  ->  the same, known as raised"""

from __future__ import annotations

from qwenopt.graphs.adopt import adopt
from qwenopt.graphs.context import Context
from qwenopt.ops import KV_APPEND


def raise_kv_append(ctx: Context) -> None:
    """Adopt the writes of a paged cache."""
    adopt(ctx, KV_APPEND)
