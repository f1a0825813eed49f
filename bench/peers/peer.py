"""What every peer offers: how it is installed, given the checkpoint and loaded, and how a loaded one is asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

TAIL_LINES = 6


class PeerError(Exception):
    """A peer cannot be installed or run; the text says why and goes into the table."""


@dataclass(frozen=True)
class Place:
    """The folder outside the repository that belongs to one peer: its environment, converted models and logs."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "venv" / "bin" / "python"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def compiled(self) -> Path:
        """Compile caches, kept from run to run."""
        return self.root / "compiled"

    @property
    def log(self) -> Path:
        """Where the last installation, conversion or run wrote what it had to say."""
        return self.root / "log.txt"


@dataclass(frozen=True)
class Timing:
    """What one request took, in seconds, and the token that followed each prompt."""

    seconds: float
    first_tokens: list[int]


class Engine(Protocol):
    """A peer with the model loaded, in its own process."""

    def prefill(self, prompt: list[int]) -> Timing:
        """Read the prompt: seconds from its ids to the logits of its last position."""
        ...

    def decode(self, prompts: list[list[int]], steps: int) -> Timing:
        """Read the prompts, then decode `steps` tokens of each greedily: seconds of these steps alone."""
        ...


class Peer(ABC):
    """One contender. The driver installs and prepares it; a worker process in its environment loads it."""

    name: str
    # Requirements of its own environment; without any it runs in the environment of the driver.
    pins: tuple[str, ...] = ()
    # Distributions that come along and are removed again.
    without: tuple[str, ...] = ()
    # Distributions whose versions are reported.
    packages: tuple[str, ...] = ("torch", "transformers")
    # Peak memory over the bytes of the weights, by experience; decides how many peers run side by side.
    memory: float = 1.6

    def install(self, place: Place) -> None:
        """Install into `place` all that `pins` names."""
        from bench.peers import install

        install.pip(place, "install", *self.pins)
        if self.without:
            install.pip(place, "uninstall", "--yes", *self.without)

    def prepare(self, place: Place, checkpoint: Path) -> Path:
        """The model as this peer reads it, made from the checkpoint and kept in `place`; by default the checkpoint."""
        return checkpoint

    def environment(self, place: Place, threads: int) -> dict[str, str]:
        """Environment variables of its process, besides those of the driver."""
        return {"OMP_NUM_THREADS": str(threads)}

    @abstractmethod
    def load(self, model: Path, threads: int) -> Engine:
        """Load what `prepare` returned, in bfloat16, to run with that many threads. Called in the worker process."""

    def versions(self) -> dict[str, str | None]:
        """Versions of `packages`. Called in the worker process."""
        from qwenopt.cli import machine

        return machine.versions(self.packages)


def tail(text: str, lines: int = TAIL_LINES) -> str:
    """The last lines of a log that are not empty."""
    kept = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(kept[-lines:])


def read_tail(path: Path) -> str:
    """The last lines of a log file."""
    try:
        return tail(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""


def to_json(timing: Timing) -> dict[str, Any]:
    """A timing as a worker sends it."""
    return {"seconds": timing.seconds, "first_tokens": timing.first_tokens}
