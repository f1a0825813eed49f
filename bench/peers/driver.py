"""One measurement: install, convert, start group by group, take turns, stop."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.peers import install, registry, results, rounds, workloads
from bench.peers.client import Worker
from bench.peers.peer import Peer, PeerError, Place
from bench.peers.results import Start
from qwenopt.cli import machine, measure
from qwenopt.testing import fullsize

# Of the free memory, what the workers may take.
MEMORY_SHARE = 0.9
PROCESS_BYTES = 500e6
# Passes over memory at the start of a round; one alone may be disturbed.
READS = 3
MATMUL_SIZE = 2048


@dataclass(frozen=True)
class Settings:
    """What to measure, and how."""

    size: str
    names: Sequence[str]
    loads: Sequence[str]
    rounds: int
    steps: int
    threads: int
    may_install: bool
    cold: bool


def place_of(peer: Peer) -> Place:
    """The folder of a peer."""
    return Place(fullsize.cache_root() / "peers" / peer.name)


def run(settings: Settings) -> dict[str, Any]:
    """Measure; returns everything that goes into the JSON file. A peer that fails is in it, with the reason."""
    cost, vocab = workloads.cost_of(settings.size)
    requests = {name: workloads.WORKLOADS[name].request(vocab, settings.steps) for name in settings.loads}
    starts = {name: Start() for name in settings.names}
    models = _prepare(settings, starts)
    probe = Probe()
    needs = {name: registry.PEERS[name].memory * cost.weight_bytes + PROCESS_BYTES for name in models}
    available = machine.memory_bytes()[1] * MEMORY_SHARE
    grouped = rounds.groups(needs, registry.OURS, available) if registry.OURS in models else []
    samples = rounds.Samples()
    for i, group in enumerate(grouped):
        indices = range(i * settings.rounds, (i + 1) * settings.rounds)
        workers = _start(group, models, settings, requests, starts)
        try:
            say(f"{settings.rounds} rounds of {', '.join(workers)}")
            rounds.run(workers, requests, indices, probe.read_gbps, samples)
        finally:
            _stop(workers, starts)
    limits = probe.limits()
    return {
        "command": "bench.peers",
        "size": settings.size,
        "machine": machine.facts(settings.threads),
        "rounds": settings.rounds,
        "steps": settings.steps,
        "cold": settings.cold,
        "workloads": {name: asdict(workloads.WORKLOADS[name]) for name in settings.loads},
        "cost": asdict(cost),
        "groups": grouped,
        "read_gbps": measure.spread(list(samples.gbps.values())).to_dict() if samples.gbps else None,
        "peak": asdict(limits),
        "peers": results.figures(samples, starts, registry.OURS, cost, limits, settings.steps),
    }


class Probe:
    """What the machine allows: read bandwidth anew for each round, peak arithmetic as the best of all rounds."""

    def __init__(self) -> None:
        self._ceilings = measure.Ceilings()
        self._register_gflops = self._matmul_gflops = 0.0

    def read_gbps(self) -> float:
        """Read bandwidth now, in GB/s; notes the peak as well."""
        self._register_gflops = max(self._register_gflops, self._ceilings.bf16_gflops())
        self._matmul_gflops = max(self._matmul_gflops, self._ceilings.matmul_gflops("bfloat16", MATMUL_SIZE))
        return statistics.median(self._ceilings.read_gbps() for _ in range(READS))

    def limits(self) -> results.Limits:
        """The peaks of the rounds so far."""
        return results.Limits(self._register_gflops, self._matmul_gflops)


def say(text: str) -> None:
    """One line of progress."""
    print(text, flush=True)


def _prepare(settings: Settings, starts: dict[str, Start]) -> dict[str, Path]:
    """Install and convert; returns the model of each contender that got so far."""
    checkpoint = fullsize.ensure(settings.size)
    models: dict[str, Path] = {}
    for name in settings.names:
        peer = registry.PEERS[name]
        place = place_of(peer)
        say(f"{name}: checking installation and model")
        try:
            install.ensure(peer, place, settings.may_install)
            models[name] = peer.prepare(place, checkpoint)
        except (PeerError, OSError) as error:
            _fail(name, starts, error)
    return models


def _start(
    group: Sequence[str],
    models: dict[str, Path],
    settings: Settings,
    requests: dict[str, dict[str, Any]],
    starts: dict[str, Start],
) -> dict[str, Worker]:
    """Start the workers of a group one after the other, and let each do every workload once."""
    workers: dict[str, Worker] = {}
    for name in group:
        peer = registry.PEERS[name]
        place = place_of(peer)
        if settings.cold:
            shutil.rmtree(place.compiled, ignore_errors=True)
        say(f"{name}: loading, compiling, warming up")
        try:
            worker = Worker(peer, place, models[name], settings.threads)
        except (PeerError, OSError) as error:
            _fail(name, starts, error)
            continue
        try:
            _warm_up(worker, requests, starts[name])
            workers[name] = worker
        except PeerError as error:
            _fail(name, starts, error)
            worker.close()
    return workers


def _warm_up(worker: Worker, requests: dict[str, dict[str, Any]], start: Start) -> None:
    """The prefill comes first: its answer ends the time to the first token."""
    start.versions = worker.versions
    start.load_seconds = time.perf_counter() - worker.started
    start.first_tokens = []
    for request in sorted(requests.values(), key=lambda r: r["kind"] != "prefill"):
        answer = worker.ask(request)
        start.first_tokens += answer["first_tokens"]
        if request["kind"] == "prefill":
            start.first_token_seconds = time.perf_counter() - worker.started


def _stop(workers: dict[str, Worker], starts: dict[str, Start]) -> None:
    for name, worker in workers.items():
        starts[name].peak_memory_bytes = max(starts[name].peak_memory_bytes, worker.peak_memory_bytes())
        worker.close()


def _fail(name: str, starts: dict[str, Start], error: Exception) -> None:
    starts[name].error = str(error)
    say(f"{name} failed: {error}")
