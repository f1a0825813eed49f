"""zentorch, AMD's backend of torch.compile for the CPU."""

from __future__ import annotations

from pathlib import Path

from bench.peers import transformers_engine, versions
from bench.peers.inductor import Inductor
from bench.peers.peer import Engine, Place

# The matrix product that AMD's guide recommends for language models, and weights that are laid out anew beside the
# original ones: by default they are changed in place, and a second graph on the same model computes nonsense.
SETTINGS = {"ZENDNNL_MATMUL_ALGO": "1", "ZENDNNL_MATMUL_WEIGHT_CACHE": "1"}


class Zentorch(Inductor):
    """On the same transformers, StaticCache and static shapes as Inductor, on which it stands."""

    name = "zentorch"
    pins = versions.ZENTORCH
    packages = ("zentorch", "torch", "transformers")
    memory = 3.5

    def environment(self, place: Place, threads: int) -> dict[str, str]:
        return super().environment(place, threads) | SETTINGS

    def load(self, model: Path, threads: int) -> Engine:
        import zentorch  # noqa: F401  (registers the backend)

        return transformers_engine.load(model, threads, "zentorch")
