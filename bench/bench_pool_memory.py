"""paged_attention over pools in large pages of memory, as a cache makes them, beside pools from torch.zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt import native
from qwenopt.cli import measure
from qwenopt.ops import PAGED_ATTENTION
from qwenopt.runtime import pool_memory

ROUNDS, LAYERS = 9, 4
HEADS, KV_HEADS, DIM, PAGE = 16, 8, 128, 16
BF16 = torch.bfloat16

CASES = [
    pytest.param(2, 1024, id="2x1k", marks=pytest.mark.ci),
    pytest.param(16, 2048, id="16x2k"),
    pytest.param(1, 32768, id="1x32k"),
]


def filled(pool: Tensor) -> Tensor:
    return pool.copy_(torch.randn(pool.shape[1:]))


@pytest.mark.skipif(not native.available(), reason=f"the kernel is native: {native.why_not()}")
@pytest.mark.parametrize("order", ["in-order", "random"])
@pytest.mark.parametrize(("rows", "present"), CASES)
def bench_pool_memory(benchmark: Any, rows: int, present: int, order: str) -> None:
    """`gain`: how many times as fast the cache's pools are; `share_of_read` of each, in the same rounds."""
    pages = rows * present // PAGE
    shape, cpu = (pages, KV_HEADS, PAGE, DIM), torch.device("cpu")
    table = (torch.arange(pages) if order == "in-order" else torch.randperm(pages)).to(torch.int32).view(rows, -1)
    q = torch.randn(1, rows, HEADS, DIM).to(BF16).transpose(1, 2)
    starts, positions = torch.arange(rows + 1, dtype=torch.int32), torch.full((rows,), present - 1)
    lib, threads = native.C(), torch.get_num_threads()
    scratch = pool_memory.zeros((measure.READ_BYTES,), torch.uint8, cpu).fill_(1)

    def calls(pools: list[tuple[Tensor, Tensor]]) -> Any:
        def run() -> None:
            for k, v in pools:
                PAGED_ATTENTION(q, k, v, None, None, table, starts, positions, None, 0, DIM**-0.5)

        return lambda: measure.seconds(run)

    kinds = {"cache": lambda: pool_memory.zeros(shape, BF16, cpu), "torch": lambda: torch.zeros(shape, dtype=BF16)}
    contenders = {k: calls([(filled(make()), filled(make())) for _ in range(LAYERS)]) for k, make in kinds.items()}
    contenders["read"] = lambda: measure.seconds(
        lambda: lib.read_bandwidth(scratch.data_ptr(), scratch.nbytes, threads)
    )
    for contender in contenders.values():
        contender()
    rounds = measure.alternate(contenders, ROUNDS)
    num_bytes = LAYERS * 2 * 2 * rows * present * KV_HEADS * DIM
    ideal = [seconds * num_bytes / scratch.nbytes for seconds in rounds["read"]]
    benchmark.extra_info |= {
        "read_gbps": measure.spread([scratch.nbytes / s / 1e9 for s in rounds["read"]]).to_dict(),
        "gain": measure.spread([a / b for a, b in zip(rounds["torch"], rounds["cache"], strict=True)]).to_dict(),
        "share_of_read": {
            kind: measure.spread([a / b for a, b in zip(ideal, rounds[kind], strict=True)]).to_dict() for kind in kinds
        },
    }
    benchmark.pedantic(contenders["cache"], rounds=3)
