"""Importing the package: cheap, safe under TORCH_LOGS, and never twice under two names."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qwenopt

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("module", ["qwenopt", "qwenopt.errors", "qwenopt.demo"])
def test_import_loads_neither_torch_nor_transformers(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'numpy', 'triton') if m in sys.modules])"
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_torch_starts_with_our_logs_on(tmp_path: Path) -> None:
    # torch imports qwenopt and the packages in it at the end of its own import; an error there breaks `import torch`.
    done = run("import torch; print('alive')", tmp_path, TORCH_LOGS="+qwenopt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["alive"]


@pytest.mark.parametrize("name", ["graphs", "triton_kernels"])
def test_bare_import_is_refused(name: str) -> None:
    done = run(f"import {name}", ROOT)
    assert done.returncode != 0
    assert f"ImportError: import qwenopt.{name}, not {name}" in done.stderr


def test_unknown_attribute_names_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'lastreport'; did you mean 'last_report'\?"):
        qwenopt.lastreport  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'zzz'; it has PagedKVCache, Report"):
        qwenopt.zzz  # noqa: B018
    assert not hasattr(qwenopt, "__wrapped__")


@pytest.mark.parametrize("name", qwenopt.__all__)
def test_public_names_load(name: str) -> None:
    assert name in dir(qwenopt)
    assert getattr(qwenopt, name) is getattr(qwenopt, name)


def test_version_is_the_installed_one() -> None:
    assert qwenopt.__version__ == importlib.metadata.version("qwenopt")
