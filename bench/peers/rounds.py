"""Taking turns: in which order contenders run, which of them fit into memory together, and the rounds themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.peers.client import Contender
from bench.peers.peer import PeerError

# The OpenMP threads of the one before are still spinning for some 0.2 s after their last work.
SETTLE_SECONDS = 0.25


def order(names: Sequence[str], index: int) -> list[str]:
    """The order of round `index`: another one begins each time, and every other round runs backwards."""
    start = (index // 2) % len(names)
    turned = [*names[start:], *names[:start]]
    return turned[::-1] if index % 2 else turned


def groups(needs: Mapping[str, float], ours: str, available: float) -> list[list[str]]:
    """Contenders that fit into `available` bytes together, each group beginning with `ours`.

    A contender that is too large for any group gets one of its own, where it may still succeed.
    """
    made: list[list[str]] = []
    left = 0.0
    for name, need in needs.items():
        if name == ours:
            continue
        if not made or need > left:
            made.append([ours])
            left = available - needs[ours]
        made[-1].append(name)
        left -= need
    return made or [[ours]]


@dataclass
class Samples:
    """What the rounds gave. `seconds[workload][name]` maps the index of a round to seconds, as `gbps` does to GB/s."""

    seconds: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    gbps: dict[int, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def add(self, workload: str, name: str, index: int, seconds: float) -> None:
        self.seconds.setdefault(workload, {}).setdefault(name, {})[index] = seconds


def run(
    contenders: Mapping[str, Contender],
    requests: Mapping[str, dict[str, Any]],
    rounds: range,
    read_gbps: Callable[[], float],
    samples: Samples,
    settle_seconds: float = SETTLE_SECONDS,
) -> None:
    """Send every request to every contender once a round. One that fails is noted in `samples` and left out after.

    `rounds` are the indices to use, so that the rounds of several groups are told apart.
    """
    alive = list(contenders)
    for index in rounds:
        time.sleep(settle_seconds)
        samples.gbps[index] = read_gbps()
        for workload, request in requests.items():
            for name in order(alive, index) if alive else ():
                time.sleep(settle_seconds)
                try:
                    samples.add(workload, name, index, contenders[name].ask(request)["seconds"])
                except PeerError as error:
                    samples.errors[name] = str(error)
                    alive.remove(name)
