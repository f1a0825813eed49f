"""What the CUDA kernels do not have is refused, in words, before anything is launched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qwenopt.ops.cuda import budget_step, kv_append, linear, paged_attention, qk_norm_rope
from qwenopt.ops.triton import paged_attention as by_triton
from qwenopt.testing.budget_rows import random_rows
from qwenopt.testing.ragged import Ragged

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


def test_prefill_over_pools_that_triton_refuses_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernel takes one layout for keys and values; this one reads each as it lies."""
    args = list(Ragged((200, 90), (200, 90), heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16).build())
    taken: list[str] = []
    monkeypatch.setattr(paged_attention.triton, "available", lambda: None)
    monkeypatch.setattr(paged_attention.by_triton, "paged_attention", lambda *_: taken.append("triton"))
    monkeypatch.setattr(paged_attention, "paged_attention", lambda *_: taken.append("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=2))
    monkeypatch.setattr(by_triton, "one_device", lambda **_: None)
    for _ in range(2):
        assert not paged_attention.is_decoding(args[0], args[5])
        paged_attention.paged_attention_of_any(None, *args)
        args[2] = args[2].transpose(1, 2).contiguous().transpose(1, 2)
    assert taken == ["triton", "cuda"]
