"""Build qwenopt: Python packages from four folders, and one torch-free native module.

Metadata is in pyproject.toml. `QWENOPT_NO_NATIVE=1 pip install .` gives a pure Python wheel.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
OUTER_PACKAGES = {
    "qwenopt.triton_kernels": "triton_kernels",
    "qwenopt.graphs": "graphs",
    "qwenopt.cuda_src": "csrc/cuda/kernels",
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# Every file of csrc/cpu/kernels is compiled once per instruction set, into a namespace of that name, but for AMX.
ISA_FLAGS = {"generic": []}
if IS_X86:
    avx512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-DQWENOPT_ISA_AVX2=1"]
    ISA_FLAGS["avx512"] = [*avx512, "-DQWENOPT_ISA_AVX512=1"]
    ISA_FLAGS["avx512bf16"] = [
        *avx512,
        "-mavx512bf16",
        "-mavx512vnni",
        "-DQWENOPT_ISA_AVX512=1",
        "-DQWENOPT_ISA_BF16=1",
    ]
    ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512bf16"], "-mamx-tile", "-mamx-bf16", "-DQWENOPT_ISA_AMX=1"]
# What AMX is for; the other kernels of a host that has it are those of avx512bf16 (csrc/cpu/kernels/types.h).
AMX_KERNELS = {"attention", "linear", "moe_experts", "probe"}
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
# No contraction: a multiply and an add stay two roundings, as they are in eager, unless a kernel asks for an fma.
# No strict aliasing: packed blocks are read as 32-bit words whatever they hold.
CFLAGS = [
    "-std=c++17",
    "-g0",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-uninitialized",  # gcc 12 and 13 warn inside their own AVX-512 headers (GCC bug 105593)
    "-Wno-maybe-uninitialized",
    *OPENMP,
]
# Last on the command line: -O1 keeps the loops of the kernels as they are written, and -g1 the lines of a report.
SANITIZE = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def packages() -> tuple[list[str], dict[str, str]]:
    """All packages, and the folders of those that lie outside qwenopt/."""
    outer = {name: folder for name, folder in OUTER_PACKAGES.items() if (ROOT / folder / "__init__.py").exists()}
    names = find_packages(where=str(ROOT), include=["qwenopt", "qwenopt.*"])
    for name, folder in outer.items():
        inner = find_packages(where=str(ROOT / folder))
        names += [name, *(f"{name}.{package}" for package in inner)]
    return names, {"qwenopt": "qwenopt", **outer}


def sources(folder: str) -> list[str]:
    """The .cpp files right inside `folder`, relative to the root."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("*.cpp"))


def native_extensions() -> list[Extension]:
    """The native module, or nothing where it was declined or no supported compiler exists."""
    if os.environ.get("QWENOPT_NO_NATIVE") == "1" or sys.platform == "win32":
        return []
    files = [*sources("csrc"), *sources("csrc/common"), *sources("csrc/cpu")]
    return [Extension("qwenopt._C", files, language="c++")]


class BuildNative(build_ext):
    """Compile each (file, instruction set) with its own flags, as many at a time as there are cores."""

    user_options = [*build_ext.user_options, ("sanitize", None, "build with the address and undefined sanitizers")]
    boolean_options = [*build_ext.boolean_options, "sanitize"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = False

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        macros = [("QWENOPT_X86", str(int(IS_X86))), ("QWENOPT_VERSION", f'"{self.distribution.get_version()}"')]
        extra = SANITIZE if self.sanitize else []
        jobs = [(ext.sources, "base", ["-O2", f"-I{pybind11.get_include()}"])]
        for isa, flags in ISA_FLAGS.items():
            files = [f for f in sources("csrc/cpu/kernels") if isa != "amx" or Path(f).stem in AMX_KERNELS]
            jobs.append((files, isa, ["-O3", f"-DQWENOPT_ISA_NS={isa}", *flags]))

        def compile_one(job: tuple[str, str, list[str]]) -> list[str]:
            source, isa, flags = job
            folder = Path(self.build_temp, isa)
            (folder / source).parent.mkdir(parents=True, exist_ok=True)
            return self.compiler.compile(
                [source], output_dir=str(folder), macros=macros, extra_postargs=[*CFLAGS, *flags, *extra]
            )

        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                work = [(source, isa, flags) for files, isa, flags in jobs for source in files]
                objects = [name for names in pool.map(compile_one, work) for name in names]
        except CompileError as error:
            raise CompileError(
                f"{error}; qwenopt needs g++ or clang++ with C++17, or QWENOPT_NO_NATIVE=1 for no native code"
            ) from error
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=[*OPENMP, *(extra or ["-s"])], target_lang="c++"
        )


NAMES, FOLDERS = packages()
setup(
    packages=NAMES,
    package_dir=FOLDERS,
    package_data={
        "qwenopt": ["py.typed", *(f"demo/models/**/*.{kind}" for kind in ("json", "safetensors", "jinja"))],
        "qwenopt.cuda_src": ["*.cuh"],
    },
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildNative},
    entry_points={
        "torch_dynamo_backends": ["qwenopt = qwenopt.backend:compile_graph"],
        "console_scripts": ["qwenopt = qwenopt.cli:main"],
    },
)
