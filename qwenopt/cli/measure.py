"""Measuring: medians of alternating rounds, and the ceilings of the machine taken in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Larger than the last-level caches of common processors, so that a read comes from memory; three times the largest
# where that is more (a server's shared cache can hold half a gigabyte).
READ_BYTES = 512 << 20
_MOST_READ_BYTES = 2 << 30
_PEAK_SECONDS = 0.05


@dataclass(frozen=True)
class Spread:
    """The median of several samples and the range that they cover."""

    median: float
    low: float
    high: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest of `values`, of which there must be one at least."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def alternate(
    contenders: Mapping[str, Callable[[], float]], rounds: int, before: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """Run every contender once a round, starting with another one each time; returns their results by name.

    Whatever slows the machine for a while then hits all of them, and none always runs after the same other one.
    `before` is called at the start of each round.
    """
    results: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(rounds):
        if before is not None:
            before()
        first = i % len(names)
        for name in names[first:] + names[:first]:
            results[name].append(contenders[name]())
    return results


def seconds(fn: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def default_read_bytes(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """How much to read so that it comes from memory: by the sizes of this machine's caches, as Linux tells them."""
    sizes = [path.read_text().strip() for path in caches.glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    largest = max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)
    return min(max(READ_BYTES, 3 * largest), _MOST_READ_BYTES)


class Ceilings:
    """What the memory and the arithmetic of this machine can do at best with torch's number of threads.

    Measured by the native extension (a streaming read, multiplications from registers), or, without it, by torch
    operations, which reach less: `source` says which.
    """

    def __init__(self, read_bytes: int | None = None) -> None:
        import torch

        from qwenopt import native

        self.threads = torch.get_num_threads()
        self.source = "native" if native.why_not() is None else "torch"
        self._lib = native.C() if self.source == "native" else None
        self._data = torch.ones((read_bytes or default_read_bytes()) // 8, dtype=torch.int64)

    def read_gbps(self) -> float:
        """Read bandwidth in GB/s, of one pass over memory."""
        data = self._data
        lib = self._lib
        if lib is not None:
            spent = seconds(lambda: lib.read_bandwidth(data.data_ptr(), data.nbytes, self.threads))
        else:
            spent = seconds(data.sum)
        return data.nbytes / spent / 1e9

    def bf16_gflops(self) -> float:
        """Peak bfloat16 GFLOP/s: from registers, or of a large matrix product."""
        if self._lib is None:
            return self.matmul_gflops("bfloat16")
        iterations, spent, done = 1 << 12, 0.0, 0.0
        while spent < _PEAK_SECONDS:
            iterations *= 4
            start = time.perf_counter()
            done = self._lib.peak_bf16(self.threads, iterations)
            spent = time.perf_counter() - start
        return done / spent / 1e9

    def matmul_gflops(self, dtype: str, size: int = 1024) -> float:
        """GFLOP/s of a square matrix product of torch, the best of five."""
        import torch

        a = torch.ones(size, size, dtype=getattr(torch, dtype))
        torch.mm(a, a)
        best = min(seconds(lambda: torch.mm(a, a)) for _ in range(5))
        return 2 * size**3 / best / 1e9
