"""Grids for the largest calls: a device starts up to 2^31 - 1 blocks in the first dimension, 65,535 in the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops.triton.add_rms_norm import add_rms_norm
from qwenopt.ops.triton.attention import attention
from qwenopt.ops.triton.budget_guard import budget_guard
from qwenopt.ops.triton.kv_append import kv_append
from qwenopt.ops.triton.linear_argmax import linear_argmax
from qwenopt.ops.triton.logit_signals import logit_signals
from qwenopt.ops.triton.moe_experts import moe_experts
from qwenopt.ops.triton.moe_route import moe_route
from qwenopt.ops.triton.paged_attention import paged_attention
from qwenopt.ops.triton.qk_norm_rope import qk_norm_rope
from qwenopt.ops.triton.rms_norm import rms_norm
from qwenopt.ops.triton.silu_mul import silu_mul
from qwenopt.ops.triton.top_tokens import top_tokens
from qwenopt.testing.fake_cuda import allow_cuda_views, fake_gpu

TOKENS, ROWS, VOCAB = 1 << 20, 1 << 17, 151936
FP32, IDS = torch.float32, torch.int64
POOL = (TOKENS // 16, 8, 16, 128)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def experts(dtype: torch.dtype) -> tuple[Any, ...]:
    x, gate_up, down = (empty(*s, dtype=dtype) for s in ((TOKENS, 2048), (128, 1536, 2048), (128, 2048, 768)))
    return x, empty(TOKENS, 8, dtype=IDS), empty(TOKENS, 8, dtype=dtype), gate_up, down


def rope() -> tuple[Any, ...]:
    q, k = empty(1, TOKENS, 64, 128), empty(1, TOKENS, 8, 128)
    return q, k, empty(128), empty(128), empty(1, TOKENS, 128), empty(1, TOKENS, 128), 1e-6


def prompts(rows: int, tokens: int) -> tuple[Any, ...]:
    """`tokens` queries of `rows` rows over pages."""
    q, pool, ints = empty(1, tokens, 64, 128).transpose(1, 2), empty(*POOL), torch.int32
    table, starts = empty(rows, TOKENS // 16 // rows, dtype=ints), empty(rows + 1, dtype=ints)
    return q, pool, pool, None, None, table, starts, empty(tokens, dtype=IDS), None, 0, 128**-0.5


def static_cache() -> tuple[Any, ...]:
    q, k = empty(1, TOKENS, 64, 128).transpose(1, 2), empty(1, TOKENS, 8, 128).transpose(1, 2)
    return q, k, k, None, empty(TOKENS, dtype=IDS), False, 128**-0.5


def appended() -> tuple[Any, ...]:
    k = empty(1, TOKENS, 8, 128).transpose(1, 2)
    return empty(*POOL), empty(*POOL), None, None, k, k, empty(TOKENS, dtype=IDS)


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "rms_norm": (rms_norm, lambda: (empty(TOKENS, 5120), empty(5120), 1e-6)),
    "rms_norm of heads": (rms_norm, lambda: (empty(TOKENS, 64, 128), empty(128), 1e-6)),
    "add_rms_norm": (add_rms_norm, lambda: (empty(TOKENS, 5120), empty(TOKENS, 5120), empty(5120), 1e-6)),
    "silu_mul": (silu_mul, lambda: empty(TOKENS, 51200).chunk(2, -1)),
    "qk_norm_rope": (qk_norm_rope, rope),
    "attention": (attention, static_cache),
    "paged_attention, one prompt": (paged_attention, lambda: prompts(1, TOKENS)),
    "paged_attention, many rows": (paged_attention, lambda: prompts(ROWS // 2, ROWS // 2)),
    "kv_append": (kv_append, appended),
    "moe_route": (moe_route, lambda: (empty(TOKENS, 128), 8, True)),
    "moe_experts": (moe_experts, lambda: experts(torch.bfloat16)),
    "moe_experts in float32": (moe_experts, lambda: experts(FP32)),
    "linear_argmax": (linear_argmax, lambda: (empty(16, 1024), empty(VOCAB, 1024), None)),
    "top_tokens": (top_tokens, lambda: (empty(ROWS, VOCAB), 64)),
    "logit_signals": (logit_signals, lambda: (empty(ROWS, VOCAB), 7, True)),
    "budget_guard": (
        budget_guard,
        lambda: (empty(ROWS, VOCAB), empty(ROWS, 128, dtype=torch.int32), empty(8, dtype=torch.int32)),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_grids_are_ones_that_a_device_starts(name: str) -> None:
    assert allow_cuda_views() is None
    call, args = CALLS[name]
    with fake_gpu() as gpu, gpu.mode:
        call(*(gpu.tensor(a) if isinstance(a, Tensor) else a for a in args()))
    assert gpu.grids
    for kernel, (first, *others) in zip(gpu.launched, gpu.grids, strict=True):
        assert 0 < first < 1 << 31, kernel
        assert all(0 < n <= 65535 for n in others), f"{kernel}: {(first, *others)}"
