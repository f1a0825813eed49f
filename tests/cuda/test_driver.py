"""How `qwenopt._C` starts kernels: on a CUDA driver that only takes notes (driver.c), in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwenopt import native
from qwenopt.testing import nvcc

# Where nvcc is, a module without CUDA kernels is no reason to skip: its build went wrong.
pytestmark = pytest.mark.skipif(
    not native.available() or (nvcc.nvcc() is None and not native.C().cuda_kernels()),
    reason="qwenopt._C was built without CUDA, since nvcc is not there",
)
LAUNCH = 'C.cuda_launch("budget_step", (5, 2, 1), 32, struct.pack("=10q", *range(7, 17)), 1, 77)'


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler (gcc or clang)")
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = str(Path(__file__).with_name("driver.c"))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), source], check=True)
    return library


def said(driver: Path, *lines: str, **env: str) -> list[str]:
    """What the driver, and the lines, print."""
    code = "\n".join(["import struct", "from qwenopt import native", "C = native.C()", *lines])
    path = {"LD_LIBRARY_PATH": str(driver.parent)}
    done = subprocess.run(
        [sys.executable, "-u", "-c", code],
        env={**os.environ, **path, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def failing(call: str) -> tuple[str, ...]:
    return ("try:", f"    {call}", "except Exception as error:", "    print(type(error).__name__, error)")


def test_a_kernel_is_loaded_once_and_started(driver: Path) -> None:
    started = "launch 5 2 1, 32 1 1, shared 0, stream 77, args 7 16, depth 1"
    first = ["retain 1", "load ba55ed50 depth 1", "function budget_step", started]
    assert said(driver, LAUNCH, LAUNCH, "print(C.cuda_missing())") == [*first, started, "None"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("retain", "cuda: context of device 1: out of memory (CUDA error 2)"),
        ("load", r"cuda: loading budget_step.cuh (built by nvcc "),
        ("function", "cuda: kernel budget_step: out of memory (CUDA error 2)"),
        ("launch", "cuda: budget_step on device 1: out of memory (CUDA error 2)"),
    ],
)
def test_what_fails_is_named(driver: Path, call: str, text: str) -> None:
    *_, last = said(driver, *failing(LAUNCH), FAKE_FAIL=call)
    assert last.startswith(f"RuntimeError {text}")
    assert last.endswith("out of memory (CUDA error 2)")


def test_a_kernel_that_is_not_there(driver: Path) -> None:
    *_, last = said(driver, *failing(LAUNCH.replace("budget_step", "nothing")))
    assert last.startswith("ValueError cuda: no kernel nothing; this module has ")
    assert said(driver, *failing(LAUNCH.replace("=10q", "=9qI")))[-1] == (
        "ValueError cuda: budget_step with 76 bytes of arguments; every field has 8"
    )


def test_a_driver_that_is_too_old_or_does_not_start(driver: Path) -> None:
    (old,) = said(driver, "print(C.cuda_missing())", FAKE_VERSION="11080")
    assert old.startswith("the driver is for CUDA 11.8, the kernels of qwenopt._C were built by nvcc ")
    assert old.endswith("; update the driver, or build with an older nvcc")
    dead = said(driver, "print(C.cuda_missing())", *failing(LAUNCH), FAKE_FAIL="init")
    reason = "the CUDA driver does not start: out of memory"
    assert dead == [reason, f"ValueError cuda: {reason}"]
