"""calls of qwenopt::budget_guard and qwenopt::budget_step (`ThinkingState`)  ->  the same, known as raised"""

from __future__ import annotations

from qwenopt.graphs.adopt import adopt
from qwenopt.graphs.context import Context
from qwenopt.ops import BUDGET_GUARD, BUDGET_STEP


def raise_budget_guard(ctx: Context) -> None:
    adopt(ctx, BUDGET_GUARD)


def raise_budget_step(ctx: Context) -> None:
    adopt(ctx, BUDGET_STEP)
