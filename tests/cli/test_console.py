"""Tables, progress and JSON files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from qwenopt.cli import console, measure
from qwenopt.errors import QwenoptError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_table_aligns() -> None:
    assert console.table(["a", "bb"], [["xyz", "1"]]) == "a    bb\n---  --\nxyz   1"


def test_progress_in_a_log_is_ten_lines() -> None:
    out = io.StringIO()
    bar = console.Progress("writing", 2.0, "GB", out)
    for i in range(201):
        bar.update(i / 100)
    lines = out.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[-1] == "writing: 2.0 of 2.0 GB"


def test_progress_on_a_terminal_is_one_line() -> None:
    out = Terminal()
    bar = console.Progress("writing", 2.0, "GB", out)
    for i in range(201):
        bar.update(i / 100)
    assert out.getvalue().count("\n") == 1
    assert f"[{'#' * console.BAR_WIDTH}] 2.0 of 2.0 GB" in out.getvalue()


def test_waiting_can_be_stopped_early_and_twice() -> None:
    out = Terminal()
    with console.Waiting("compiling", out) as waiting:
        waiting.stop()
        waiting.stop()
    assert out.getvalue() == "\r\x1b[K"


def test_json_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    console.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        console.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_paths_are_refused(tmp_path: Path) -> None:
    console.check_writable(None)
    console.check_writable(tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()
    with pytest.raises(QwenoptError, match="is a folder"):
        console.check_writable(tmp_path)
    with pytest.raises(QwenoptError, match="does not exist; create it first"):
        console.check_writable(tmp_path / "no" / "x.json")


def test_spread() -> None:
    assert measure.spread([3.0, 1.0, 2.0]) == measure.Spread(2.0, 1.0, 3.0, 3)


def test_alternating_rounds_start_with_another_contender_each() -> None:
    order: list[str] = []
    contenders = {name: (lambda name=name: order.append(name) or 1.0) for name in "abc"}
    results = measure.alternate(contenders, 3, lambda: order.append("|"))
    assert "".join(order) == "|abc|bca|cab"
    assert results == {name: [1.0] * 3 for name in "abc"}


def test_ceilings_are_positive() -> None:
    ceilings = measure.Ceilings(1 << 20)
    assert ceilings.read_gbps() > 0
    assert ceilings.bf16_gflops() > 0
    assert ceilings.matmul_gflops("float32", 64) > 0
