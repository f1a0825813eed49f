"""Figures from samples: speeds, ratios to ours in the same rounds, shares of what the machine allows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bench.peers.rounds import Samples
from bench.peers.workloads import WORKLOADS, Cost
from qwenopt.cli import measure


@dataclass
class Start:
    """How a contender started: seconds from the start of its process, and what it said of itself."""

    versions: dict[str, str | None] = field(default_factory=dict)
    load_seconds: float | None = None
    first_token_seconds: float | None = None
    first_tokens: list[int] = field(default_factory=list)
    peak_memory_bytes: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Limits:
    """Peak bfloat16 arithmetic in GFLOP/s: of vector instructions in registers, and of torch's matrix product."""

    register_gflops: float
    matmul_gflops: float

    @property
    def gflops(self) -> float:
        """The larger: processors with matrix units do more than their vectors can."""
        return max(self.register_gflops, self.matmul_gflops)


def figures(samples: Samples, starts: dict[str, Start], ours: str, cost: Cost, limits: Limits, steps: int) -> Any:
    """Everything about every contender, by name, as it stands in the JSON file."""
    found: dict[str, Any] = {}
    for name, start in starts.items():
        found[name] = {
            "error": samples.errors.get(name) or start.error,
            "versions": start.versions,
            "load_seconds": start.load_seconds,
            "first_token_seconds": start.first_token_seconds,
            "peak_memory_bytes": start.peak_memory_bytes,
            "same_first_tokens": _agreement(start.first_tokens, starts[ours].first_tokens),
            "workloads": {
                workload: _figure(workload, by_name[name], by_name.get(ours, {}), samples.gbps, cost, limits, steps)
                for workload, by_name in samples.seconds.items()
                if name in by_name
            },
        }
    return found


def _figure(
    workload: str,
    seconds: dict[int, float],
    ours: dict[int, float],
    gbps: dict[int, float],
    cost: Cost,
    limits: Limits,
    steps: int,
) -> dict[str, Any]:
    """One contender at one workload. A ratio above 1 means faster than ours, and a share is one of its own round."""
    load = WORKLOADS[workload]
    ratios = [ours[i] / value for i, value in seconds.items() if i in ours]
    shares = [cost.share(load, value, steps, gbps[i], limits.gflops) for i, value in seconds.items()]
    speeds = [load.tokens(steps) / value for value in seconds.values()]
    return {
        "tokens_per_second": measure.spread(speeds).to_dict(),
        "ratio_to_ours": measure.spread(ratios).to_dict() if ratios else None,
        "share_of_bf16_peak" if load.kind == "prefill" else "share_of_read_bandwidth": measure.spread(shares).to_dict(),
    }


def _agreement(tokens: list[int], ours: list[int]) -> str | None:
    """How many prompts are followed by the same token as in ours: one that runs another model agrees with none."""
    if not tokens or len(tokens) != len(ours):
        return None
    return f"{sum(a == b for a, b in zip(tokens, ours, strict=True))}/{len(ours)}"
