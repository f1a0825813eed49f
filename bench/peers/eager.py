"""transformers without any compiler; experts by its grouped_mm."""

from __future__ import annotations

from pathlib import Path

from bench.peers import transformers_engine
from bench.peers.peer import Engine, Peer


class Eager(Peer):
    """In the environment of the driver."""

    name = "eager"

    def load(self, model: Path, threads: int) -> Engine:
        return transformers_engine.load(model, threads, "eager")
