"""doctor never fails itself: not without torch, not without the native kernels, not without shipped models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwenopt import cli
from qwenopt.cli import doctor, machine
from qwenopt.graphs import PASSES

WITHOUT_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import importlib.util, importlib.metadata
real = importlib.util.find_spec
import qwenopt.cli.doctor as d
d.find_spec = lambda name: None if name in ("torch", "transformers") else real(name)
from qwenopt.cli import main
sys.exit(main(["doctor"]))
"""


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "doctor.json"
    assert cli.main(["doctor", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "torch" in shown
    assert machine.cpu_model() in shown
    data = json.loads(path.read_text())
    same_for_all_dtypes = {"budget_guard", "budget_step"}
    assert set(data["ops"]) == {name for name, _ in PASSES if name} - same_for_all_dtypes
    assert all(set(by_dtype) == {"float32", "bfloat16", "float16"} for by_dtype in data["ops"].values())
    names = [finding["name"] for finding in data["findings"]]
    assert {"torch", "transformers", "native kernels", "C++ compiler", "triton", "cupy"} <= set(names)
    for finding in data["findings"]:
        if finding["state"] == doctor.MISSING:
            assert finding["fix"], finding


def test_doctor_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert 'pip install "torch>=' in done.stdout
    assert "cannot be said" in done.stdout
    assert "Traceback" not in done.stderr


def test_doctor_without_native_kernels() -> None:
    env = os.environ | {"QWENOPT_NO_NATIVE": "1"}
    command = [sys.executable, "-m", "qwenopt.cli", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert "unset QWENOPT_NO_NATIVE" in done.stdout
    assert "reference, because of cpu: QWENOPT_NO_NATIVE=1" in done.stdout


@pytest.mark.parametrize(
    ("version", "state"), [("2.10.1", "broken"), ("2.11.0", "ok"), ("2.15.1+cpu", "ok"), ("2.16.0", "broken")]
)
def test_torch_versions(version: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda name: version)
    assert doctor._package("torch", doctor.TORCH, "fix").state == state


def test_a_missing_compiler_has_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/dnf" if name == "dnf" else None)
    found = doctor._compiler()
    assert (found.state, found.fix) == (doctor.MISSING, "sudo dnf install gcc-c++")


def test_a_part_that_cannot_be_looked_at_is_a_finding() -> None:
    def fail() -> doctor.Finding:
        raise OSError("no such device")

    assert doctor._safely("x", fail).state == doctor.BROKEN


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("sse2", "generic"), ("avx2 fma", "avx2"), ("avx2 fma avx512f avx512bw avx512vl avx512dq", "avx512")],
)
def test_isa(flags: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpuinfo", lambda key: flags)
    assert machine.isa() == expected


def test_bench_needs_a_source_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--folder", str(tmp_path)]) == 2
    assert "needs the bench folder of qwenopt's source tree" in capsys.readouterr().err
