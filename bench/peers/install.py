"""Environments of the peers: made once, with a stamp that names what is in them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.peers.peer import Peer, PeerError, Place, read_tail

ROOT = Path(__file__).resolve().parents[2]
STAMP = "installed.txt"


def ensure(peer: Peer, place: Place, may_install: bool = True) -> None:
    """Install the peer unless its stamp says that these versions are there. Raises PeerError with the reason."""
    if not peer.pins or is_installed(peer, place):
        return
    if not may_install:
        raise PeerError("not installed, and --no-install was given")
    (place.root / STAMP).unlink(missing_ok=True)
    place.root.mkdir(parents=True, exist_ok=True)
    place.log.unlink(missing_ok=True)
    if not place.python.exists():
        run(place, [sys.executable, "-m", "venv", str(place.python.parents[1])])
    peer.install(place)
    (place.root / STAMP).write_text(_stamp(peer), encoding="utf-8")


def is_installed(peer: Peer, place: Place) -> bool:
    """Whether the environment was made whole, with the versions wanted now."""
    path = place.root / STAMP
    return place.python.exists() and path.is_file() and path.read_text(encoding="utf-8") == _stamp(peer)


def _stamp(peer: Peer) -> str:
    return "".join(f"{pin}\n" for pin in (f"python {sys.version.split()[0]}", *peer.pins))


def pip(place: Place, *arguments: str, environment: dict[str, str] | None = None) -> None:
    """Run pip in the peer's environment."""
    run(place, [str(place.python), "-m", "pip", *arguments], environment=environment)


def run(
    place: Place, command: Sequence[str], cwd: Path | None = None, environment: dict[str, str] | None = None
) -> None:
    """Run a command with its output appended to the peer's log. Raises PeerError with the last lines of it."""
    with place.log.open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        done = subprocess.run(
            command,
            cwd=cwd,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        what = " ".join(command[:4])
        raise PeerError(f"`{what} ...` ended with exit status {done.returncode}:\n{read_tail(place.log)}")
