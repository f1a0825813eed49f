"""calls of qwenopt::logit_signals (`ThinkingState`)  ->  the same, known as raised"""

from __future__ import annotations

from qwenopt.graphs.adopt import adopt
from qwenopt.graphs.context import Context
from qwenopt.ops import LOGIT_SIGNALS


def raise_logit_signals(ctx: Context) -> None:
    adopt(ctx, LOGIT_SIGNALS)
