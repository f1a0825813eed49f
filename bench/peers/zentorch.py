"""zentorch, AMD's backend of torch.compile for the CPU."""

from __future__ import annotations

from pathlib import Path

from bench.peers import transformers_engine, versions
from bench.peers.inductor import Inductor
from bench.peers.peer import Engine


class Zentorch(Inductor):
    """On the same transformers, StaticCache and static shapes as Inductor, on which it stands."""

    name = "zentorch"
    pins = versions.ZENTORCH
    packages = ("zentorch", "torch", "transformers")
    memory = 2.5

    def load(self, model: Path, threads: int) -> Engine:
        import zentorch  # noqa: F401  (registers the backend)

        # It lays out the weights anew in place, so that eager cannot read them any more.
        return transformers_engine.load(model, threads, "zentorch", read_in_steps=True)
