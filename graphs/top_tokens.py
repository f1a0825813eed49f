"""calls of qwenopt::top_tokens (`Sampler`)  ->  the same, known as raised"""

from __future__ import annotations

from qwenopt.graphs.adopt import adopt
from qwenopt.graphs.context import Context
from qwenopt.ops import TOP_TOKENS


def raise_top_tokens(ctx: Context) -> None:
    adopt(ctx, TOP_TOKENS)
