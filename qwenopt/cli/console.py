"""What the commands print with: tables, progress on a terminal or in a log, JSON files written whole or not at all."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from qwenopt.errors import QwenoptError

BAR_WIDTH = 30
LINE_EVERY_SECONDS = 20.0


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned text table: the first column to the left, the others to the right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for row in cells:
        parts = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


class Progress:
    """How much of a long job is done: one redrawn bar on a terminal, a line every tenth elsewhere."""

    def __init__(self, label: str, total: float, unit: str, stream: TextIO | None = None) -> None:
        self._label, self._total, self._unit = label, max(total, 1e-9), unit
        self._stream = sys.stderr if stream is None else stream
        self._on_terminal = self._stream.isatty()
        self._shown = -1

    def update(self, done: float) -> None:
        """Say that `done` of the total is finished."""
        share = min(done / self._total, 1.0)
        step = int(share * (100 if self._on_terminal else 10))
        if step == self._shown:
            return
        self._shown = step
        text = f"{done:.1f} of {self._total:.1f} {self._unit}"
        if self._on_terminal:
            bar = "#" * int(share * BAR_WIDTH)
            self._stream.write(f"\r{self._label} [{bar:<{BAR_WIDTH}}] {text} ")
            if share == 1.0:
                self._stream.write("\n")
        else:
            self._stream.write(f"{self._label}: {text}\n")
        self._stream.flush()


class Waiting:
    """Shows that a step without known length is alive: `with Waiting("compiling"): ...`, with the seconds passed."""

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self._label = label
        self._stream = sys.stderr if stream is None else stream
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Waiting:
        self._start = time.perf_counter()
        self._on_terminal = self._stream.isatty()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """The wait is over; further calls do nothing."""
        if self._done.is_set():
            return
        self._done.set()
        self._thread.join()
        if self._on_terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _tick(self) -> None:
        pause = 0.5 if self._on_terminal else LINE_EVERY_SECONDS
        while not self._done.wait(pause):
            seconds = time.perf_counter() - self._start
            text = f"{self._label} ... {seconds:.0f} s"
            self._stream.write(f"\r{text}" if self._on_terminal else f"{text}\n")
            self._stream.flush()


def check_writable(path: Path | None) -> None:
    """Raise before any work is done if a result could not be written to `path` later."""
    if path is None:
        return
    if path.is_dir():
        raise QwenoptError(f"{path} is a folder; needed: the name of a file to write")
    if not path.parent.is_dir():
        raise QwenoptError(f"{path} cannot be written: the folder {path.parent} does not exist; create it first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise QwenoptError(f"{path} cannot be written: {error.strerror}") from error


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON under a temporary name beside `path`, then move it into place."""
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
