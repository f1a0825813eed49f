"""torch.compile with Inductor, as it comes and with its freezing of weights."""

from __future__ import annotations

from pathlib import Path

from bench.peers import transformers_engine
from bench.peers.peer import Engine, Peer, Place


class Inductor(Peer):
    """In the environment of the driver, with static shapes and a compile cache that is kept."""

    name = "inductor"

    def environment(self, place: Place, threads: int) -> dict[str, str]:
        return super().environment(place, threads) | compile_caches(place)

    def load(self, model: Path, threads: int) -> Engine:
        return transformers_engine.load(model, threads, "inductor")


class InductorFreezing(Inductor):
    """The weights become constants of the graph, laid out anew for oneDNN beside the original ones."""

    name = "inductor-freezing"
    memory = 4.0

    def load(self, model: Path, threads: int) -> Engine:
        from torch._inductor import config

        config.freezing = True  # of this worker process, which does nothing else
        return super().load(model, threads)


def compile_caches(place: Place) -> dict[str, str]:
    """Where Inductor keeps compiled code: in the peer's folder."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(place.compiled)}
