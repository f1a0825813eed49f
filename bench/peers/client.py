"""The driver's end of a worker process."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from bench.peers import install
from bench.peers.peer import Peer, PeerError, Place, read_tail

# Loading includes conversions at run time; the first request of a shape may compile for minutes.
ANSWER_SECONDS = 900.0
STOP_SECONDS = 10.0


class Contender(Protocol):
    """What the rounds need of a worker."""

    def ask(self, request: dict[str, Any]) -> dict[str, Any]: ...


class Worker:
    """A peer's process with the model loaded. Raises PeerError wherever the peer fails."""

    def __init__(self, peer: Peer, place: Place, model: Path, threads: int) -> None:
        place.root.mkdir(parents=True, exist_ok=True)
        self._log = place.log
        python = place.python if peer.pins else Path(sys.executable)
        self.started = time.perf_counter()
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", "bench.peers.worker", peer.name, str(model), str(threads)],
                cwd=install.ROOT,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | peer.environment(place, threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            self.versions: dict[str, str | None] = self._receive()["versions"]
        except BaseException:
            self.close()
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerError(self._last_words()) from error
        return self._receive()

    def peak_memory_bytes(self) -> int:
        """The largest resident memory that the process has had so far; 0 where it cannot be known."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        except OSError:
            return 0
        return peak_bytes(status)

    def close(self) -> None:
        """End the process: by the end of its input, or by force."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(STOP_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _receive(self) -> dict[str, Any]:
        """The next line of the worker. It writes one line per request, so none is left in the buffer."""
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], ANSWER_SECONDS)[0]:
            raise PeerError(f"no answer within {ANSWER_SECONDS:.0f} s\n{read_tail(self._log)}")
        line = stdout.readline()
        if not line:
            raise PeerError(self._last_words())
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise PeerError(message["error"])
        return message

    def _last_words(self) -> str:
        return f"the process ended with exit status {self._process.wait()}:\n{read_tail(self._log)}"


def peak_bytes(status: str) -> int:
    """The peak resident memory that the text of /proc/PID/status names, in bytes."""
    for line in status.splitlines():
        name, _, rest = line.partition(":")
        if name == "VmHWM":
            return int(rest.split()[0]) * 1024
    return 0
