"""What is shipped: a wheel with nothing but `qwenopt` at its top, and an sdist that can be built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Folder in the repository -> where its files are in the wheel.
SHIPPED = {"qwenopt": "qwenopt", "graphs": "qwenopt/graphs", "triton_kernels": "qwenopt/triton_kernels"}
NATIVE_SUFFIXES = {".h", ".hpp", ".cpp", ".cu", ".cuh"}
SOURCES = ("qwenopt", "graphs", "triton_kernels", "csrc")


@dataclass(frozen=True)
class Built:
    wheel: Path
    wheel_names: frozenset[str]
    sdist_names: frozenset[str]


def files(folder: str, *suffixes: str) -> Iterator[Path]:
    for path in sorted((ROOT / folder).rglob("*")):
        if path.suffix in suffixes and "__pycache__" not in path.parts:
            yield path.relative_to(ROOT)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build sdist, and the pure wheel from that sdist: what the sdist lacks, the wheel cannot have."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
    dist = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(source)]
    env = {**os.environ, "QWENOPT_NO_NATIVE": "1"}
    done = subprocess.run(command, env=env, cwd=dist, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = frozenset(member.name.partition("/")[2] for member in archive if member.isfile())
    with zipfile.ZipFile(wheel) as archive:
        return Built(wheel, frozenset(archive.namelist()), members)


def test_wheel_is_pure_and_installs_only_qwenopt(built: Built) -> None:
    assert built.wheel.name.endswith("-py3-none-any.whl")
    top = {name.split("/")[0] for name in built.wheel_names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"qwenopt"}
    assert not [name for name in built.wheel_names if name.endswith((".so", ".a", ".o"))]


@pytest.mark.parametrize("folder", SHIPPED)
def test_wheel_has_every_module(built: Built, folder: str) -> None:
    wanted = {str(SHIPPED[folder] / path.relative_to(folder)) for path in files(folder, ".py", ".typed")}
    assert wanted
    assert wanted <= built.wheel_names, wanted - built.wheel_names


def test_wheel_has_the_demo_models(built: Built) -> None:
    wanted = {str(path) for path in files("qwenopt/demo/models", ".json", ".safetensors", ".jinja", ".txt")}
    assert wanted <= built.wheel_names, wanted - built.wheel_names


def test_wheel_has_the_cuda_sources(built: Built) -> None:
    wanted = {path.name for path in files("csrc/cuda/kernels", ".cuh")}
    shipped = {Path(name).name for name in built.wheel_names if name.endswith(".cuh")}
    assert wanted <= shipped, wanted - shipped


def test_wheel_declares_backend_and_command(built: Built) -> None:
    (name,) = [name for name in built.wheel_names if name.endswith(".dist-info/entry_points.txt")]
    with zipfile.ZipFile(built.wheel) as archive:
        text = archive.read(name).decode()
    assert "[torch_dynamo_backends]\nqwenopt = qwenopt." in text
    assert "[console_scripts]\nqwenopt = qwenopt." in text


def test_sdist_has_every_source(built: Built) -> None:
    wanted = {str(path) for path in files("csrc", *NATIVE_SUFFIXES)} | {"setup.py", "pyproject.toml", "LICENSE"}
    wanted |= {str(path) for folder in SHIPPED for path in files(folder, ".py")}
    assert wanted <= built.sdist_names, wanted - built.sdist_names


def pins(path: Path) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return dict(line.split("==") for line in lines if "==" in line)


def test_tools_are_pinned_alike() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = dict(item.split("==") for item in config["project"]["optional-dependencies"]["dev"] if "==" in item)
    installed = pins(ROOT / "requirements" / "dev.txt")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for tool, version in declared.items():
        assert installed[tool] == version
        assert f"{tool}=={version}" in hooks or tool == "mypy", f"{tool}=={version} is not in .pre-commit-config.yaml"


@pytest.mark.parametrize("name", ["build", "run", "test", "dev"])
def test_requirements_are_pinned(name: str) -> None:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    loose = [line for line in lines if line and not line.startswith(("#", "-r ")) and "==" not in line]
    assert not loose
