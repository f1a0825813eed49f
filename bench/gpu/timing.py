"""Timing on a GPU: calls in a CUDA graph, so that the host is not what is measured."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from qwenopt.lowering.cuda_graph_device import CudaGraphs

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

    Sets with weights are together larger than the second cache, so that each call finds its weights in memory.
    """
    repeated = list(variants) * -(-at_least // len(variants))

    def all_of_them() -> None:
        for args in repeated:
            fn(*args)

    graphs = CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    with graphs.turn():
        graphs.warm_up(all_of_them)
        try:
            recording = graphs.capture(all_of_them)
        except Exception:  # it reads something back, or allocates in a way that graphs forbid
            torch.cuda.synchronize()
            return elapsed(all_of_them) / len(repeated), "calls"
        recording.replay()
        return elapsed(recording.replay) / len(repeated), "graph"


def device_is_lost() -> bool:
    """Whether a fault has ended this process's use of the device: everything that it asks for then fails."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def again(module: str, *args: str) -> NoReturn:
    """Begin anew in this process's place, with a device that works."""
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *args])
