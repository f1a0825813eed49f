"""Every CUDA file compiled for compute capability 8.0 and 9.0 by nvcc and by NVRTC, with no GPU: registers, spills."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenopt.cupy_kernels import nvrtc, sources
from qwenopt.testing import nvcc

FOLDER = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "kernels"
FILES = sorted(path.name for path in FOLDER.glob("*.cuh") if nvrtc.kernel_names(path.read_text()))
# Registers of a thread, by which so many blocks are on a multiprocessor at once: three of paged attention (128
# threads), three of the products (256), eight and more of the others.
MAX_REGISTERS = {
    "budget_guard": 64,
    "budget_step": 64,
    "kv_append": 64,
    "linear": 80,
    "moe_align": 64,
    "paged_attention": 168,
    "qk_norm_rope": 64,
}
MAX_SHARED_BYTES = 48 * 1024


def limit(kernel: str) -> int:
    return next(registers for name, registers in MAX_REGISTERS.items() if kernel.startswith(name))


def assert_fits(name: str, found: dict[str, nvcc.Needs]) -> None:
    assert set(found) == set(nvrtc.kernel_names((FOLDER / name).read_text()))
    for kernel, needs in found.items():
        assert needs.spill_bytes == needs.stack_bytes == 0, f"{kernel}: {needs}"
        assert needs.registers <= limit(kernel), f"{kernel}: {needs}"
        assert needs.shared_bytes <= MAX_SHARED_BYTES, f"{kernel}: {needs}"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("name", FILES)
def test_nvcc_compiles(name: str, arch: str) -> None:
    if nvcc.nvcc() is None:
        pytest.skip("nvcc is not there (CUDA toolkit)")
    assert_fits(name, nvcc.compiled(FOLDER / name, arch))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", FILES)
def test_nvrtc_compiles(name: str, arch: str, real_compiler: nvrtc.Nvrtc) -> None:
    options = [*sources.options(arch), "--ptxas-options=-v"]
    made, said = real_compiler.compile((FOLDER / name).read_text(), name, options)
    assert made.startswith(b"\x7fELF")
    assert_fits(name, nvcc.needs(said))


def test_every_kernel_is_emulated(emulation) -> None:  # type: ignore[no-untyped-def]
    wanted = {kernel for name in FILES for kernel in nvrtc.kernel_names((FOLDER / name).read_text())}
    assert set(emulation.kernels()) == wanted
