"""What the CUDA kernels do not have is refused, in words, before anything is launched."""

from __future__ import annotations

import torch

from qwenopt.ops.cuda import budget_step, kv_append, linear, qk_norm_rope
from qwenopt.ops.cuda.launch import one_dtype
from qwenopt.testing.budget_rows import random_rows

HALF = torch.float16
REASON = "dtype torch.float16 (kernels: float32, bfloat16)"


def test_float16_is_refused_by_each() -> None:
    x, weight = torch.zeros(2, 64, dtype=HALF), torch.zeros(8, 64, dtype=HALF)
    assert linear.accepts(x, weight, None) == REASON
    q, k, one = torch.zeros(1, 4, 3, 64, dtype=HALF), torch.zeros(1, 2, 3, 64, dtype=HALF), torch.ones(64, dtype=HALF)
    table = torch.zeros(1, 3, 64, dtype=HALF)
    assert qk_norm_rope.accepts(q, k, one, one, table, table, 1e-6) == REASON
    pool, scale = torch.zeros(4, 2, 16, 64, dtype=torch.int8), torch.zeros(4, 2, 16)
    slots = torch.zeros(3, dtype=torch.int64)
    assert kv_append.accepts(pool, pool.clone(), scale, scale.clone(), k, k.clone(), slots) == REASON
    _, _, state, _, _, ids = random_rows(0)
    assert budget_step.accepts_guard(torch.zeros(len(state), 50, dtype=HALF), state, ids) == REASON


def test_dtypes_are_named() -> None:
    x = torch.zeros(1)
    assert one_dtype(x, None, x.clone()) is None
    assert one_dtype(x, x.bfloat16()) == "mixed dtypes torch.bfloat16, torch.float32"
