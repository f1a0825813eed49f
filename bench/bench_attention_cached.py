"""Decoding attention over keys that stay in the second cache: what its arithmetic takes, without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwenopt import native
from qwenopt.cli import measure
from qwenopt.ops import ATTENTION

ROUNDS, CALLS = 9, 100
SHORT, LONG, KV_HEADS, DIM = 256, 1536, 2, 128  # 1.5 MB of keys and values at most


def seconds(group: int, length: int) -> Any:
    """A call that times CALLS steps of one query over `length` keys."""
    q = torch.randn(1, 1, KV_HEADS * group, DIM).to(torch.bfloat16).transpose(1, 2)
    k, v = (torch.randn(1, KV_HEADS, length, DIM).to(torch.bfloat16) for _ in range(2))
    positions = torch.tensor([length - 1])

    def run() -> None:
        for _ in range(CALLS):
            ATTENTION(q, k, v, None, positions, False, DIM**-0.5)

    return lambda: measure.seconds(run) / CALLS


@pytest.mark.skipif(not native.available(), reason=f"the kernel is native: {native.why_not()}")
@pytest.mark.parametrize("group", [2, 4, 8])
def bench_attention_cached(benchmark: Any, group: int) -> None:
    """`ns_per_key`: one thread, for the key and the value of one head; the call itself is subtracted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        contenders = {str(n): seconds(group, n) for n in (SHORT, LONG)}
        for contender in contenders.values():
            contender()
        rounds = measure.alternate(contenders, ROUNDS)
        pairs = zip(rounds[str(SHORT)], rounds[str(LONG)], strict=True)
        ns = [(long - short) * 1e9 / ((LONG - SHORT) * KV_HEADS) for short, long in pairs]
        benchmark.extra_info |= {"ns_per_key": measure.spread(ns).to_dict()}
        benchmark.pedantic(contenders[str(LONG)], rounds=3)
    finally:
        torch.set_num_threads(threads)
