"""This package, by `qwenopt.compile`, in the environment of the driver."""

from __future__ import annotations

from pathlib import Path

from bench.peers import transformers_engine
from bench.peers.peer import Engine, Peer


class Ours(Peer):
    """What the others are compared with."""

    name = "qwenopt"
    packages = ("qwenopt", "torch", "transformers")

    def load(self, model: Path, threads: int) -> Engine:
        return transformers_engine.load(model, threads, "qwenopt")
