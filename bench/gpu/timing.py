"""Timing on a GPU: calls in a CUDA graph, so that the host is not what is measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROUNDS = 15


def elapsed(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median seconds of a call, by events of the device."""
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def each(fn: Callable[..., Any], variants: Sequence[tuple[Any, ...]], at_least: int = 24) -> tuple[float, str]:
    """Seconds of one call of `fn`, over argument sets in turn, and how: in a "graph", or by "calls" where none can be.

    The sets together are larger than the second cache, so that each call finds its weights in memory.
    """
    repeated = list(variants) * -(-at_least // len(variants))

    def all_of_them() -> None:
        for args in repeated:
            fn(*args)

    all_of_them()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_of_them()
    except Exception:  # it reads something back, or allocates in a way that graphs forbid
        torch.cuda.synchronize()
        return elapsed(all_of_them) / len(repeated), "calls"
    graph.replay()
    return elapsed(graph.replay) / len(repeated), "graph"
