"""`bench/gpu/run.sh` without a GPU: it refuses in words, and its arguments, floors, time limits and table hold."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu import floors, run, table, timing

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "gpu"


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    command = [str(FOLDER / "run.sh"), "--out", str(tmp_path / "out")]
    env = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 3
    assert "needs an NVIDIA GPU of compute capability 8.0 or newer; torch" in done.stderr
    assert not (tmp_path / "out").exists()


def test_unknown_parts_and_models_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for args, why in (
        (["--only", "build,kernel"], "--only: kernel; known: build"),
        (["--models", "7"], "--models: 7;"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run.parse(args)
        assert why in capsys.readouterr().err


def test_a_run_ends_in_nine_minutes(tmp_path: Path) -> None:
    every = run.commands(run.PARTS, run.MODELS, tmp_path)
    given = run.parse([]).seconds
    assert given < 9 * 60
    alone = [c for c in every if c.name not in ("tests", "sanitizer")]
    assert sum(c.seconds for c in alone) + run.SECONDS["tests"] <= given, "what is left is the sanitizer's"
    assert len([c for c in every if c.name == "tests"]) > 5, "side by side"
    assert [c.name for c in run.commands(["ceilings"], [], tmp_path)] == ["copy", "ceilings"]


def test_a_part_alone_has_what_it_needs_and_all_the_time(tmp_path: Path) -> None:
    every = run.commands(run.PARTS, run.MODELS, tmp_path)
    assert run.stretched(every, run.parse([]).seconds) == every, "all of them fill the time"
    some = run.commands(["decode"], ["30B-A3B"], tmp_path)
    assert [c.name for c in some] == ["copy", "ceilings", "decode"]
    longer = run.stretched(some, 530)
    assert sum(c.seconds for c in longer) == pytest.approx(530)
    assert longer[-1].seconds > 5 * run.SECONDS["decode"]


def test_a_lost_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: None)
    assert not timing.device_is_lost()
    monkeypatch.setattr(timing.torch.cuda, "synchronize", fail)
    assert timing.device_is_lost()


def test_what_takes_too_long_or_cannot_start_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = run.Command("kernels", (sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"), 9)
    monkeypatch.setattr(run, "GRACE", 2.0)
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background process
    try:
        found = run.run(slow, 2.0)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert found["ended"] == "out of time"
    assert found["said"][0] == "begun"
    assert "KeyboardInterrupt" in found["said"][-1], "interrupted, not killed"
    told = run.Command("kernels", (sys.executable, "-c", "import sys; print(sys.argv[1])", run.UNTIL), 9)
    before = time.time()
    until = float(run.run(told, 20.0)["said"][0]) - (20.0 - run.LAST)
    assert before - 0.1 <= until <= time.time() + 0.1, "told to a tenth of a second"
    assert run.run(run.Command("sanitizer", ("no-such-program",), 9), 9.0)["ended"] == "not started"
    assert run.run(run.Command("build", (sys.executable, "-c", "raise SystemExit(4)"), 9), 9.0)["ended"] == "4"


# Gigabytes a token, counted over the published checkpoints and rounded to two places.
@pytest.mark.parametrize(
    ("model", "gigabytes"), [("0.6B", 1.19), ("4B", 8.04), ("8B", 15.14), ("32B", 63.97), ("30B-A3B", 6.08)]
)
def test_floors(model: str, gigabytes: float) -> None:
    assert floors.decode_bytes(model) / 1e9 == pytest.approx(gigabytes, abs=0.005)
    assert floors.share(model, 1, 0, gigabytes / 3000, 3000) == pytest.approx(1, abs=0.005 / gigabytes)


def test_floors_of_more_rows() -> None:
    assert floors.decode_bytes("8B", 16) == floors.decode_bytes("8B")
    assert floors.decode_bytes("8B", 2, 1000) - floors.decode_bytes("8B") == 2 * 1000 * 147_456
    every = floors.decode_bytes("30B-A3B", 10_000) - floors.decode_bytes("30B-A3B")
    assert every == pytest.approx(2 * 48 * 120 * 3 * 2048 * 768)


ABOUT = {
    "device": "H", "capability": "9.0", "multiprocessors": 132, "memory_gb": 80.0, "driver": "d", "cuda": "13.0",
    "nvcc": "", "versions": {"torch": "2.11"}, "commit": "abc",
}  # fmt: skip


def test_an_empty_table_says_not_measured() -> None:
    text = table.markdown({"machine": ABOUT, "parts": []})
    assert text.count("not measured") == 1 + 4 + 3
    assert "no nvcc; torch 2.11; commit abc" in text


def test_a_table_of_what_there_is() -> None:
    results = {
        "machine": ABOUT,
        "parts": [{"part": "decode", "detail": "8B", "ended": "out of time", "seconds": 66.0, "said": ["a|b"]}],
        "ceilings": {"gbps": 3000.0, "tflops": 700.0, "launch_us": 1.3},
        "decode-8B": {
            "model": "8B",
            "runs": {
                "qwenopt": {"seconds": 0.005, "tokens_per_second": 200.0, "share": 0.8},
                "inductor": {"seconds": 0.01, "tokens_per_second": 100.0, "share": 0.4},
            },
            "not": {"qwenopt.generate": "RuntimeError: no"},
        },
        "kernels": [
            {
                "op": "linear", "case": "8B-T1", "floor_us": 10.0, "not": {"cupy": "no cupy"},
                "times": {
                    "cublas": {"us": 20.0, "share": 0.5, "by": "graph"},
                    "triton": {"us": 12.5, "share": 0.8, "by": "calls"},
                },
            },
            {"op": "linear", "case": "8B-T8", "floor_us": 0.0, "not": {"all": "no time left"}, "times": {}},
        ],
    }  # fmt: skip
    text = table.markdown(results)
    assert "| 8B | 200 (80%) | failed: RuntimeError: no | 100 (40%) | 2.00x |" in text
    assert "| linear 8B-T1 | 10.0 | triton 12.5 (80%, by calls); cublas 20.0 (50%) | cupy: no cupy |" in text
    assert "| linear 8B-T8 | not measured | not measured | all: no time left |" in text
    assert "| decode 8B | out of time | 66 s | a/b |" in text
