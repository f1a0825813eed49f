"""Build qwenopt: Python packages from four folders, and one torch-free native module.

Metadata is in pyproject.toml. `QWENOPT_NO_NATIVE=1 pip install .` gives a pure Python wheel. Where nvcc is there (on
the PATH, under CUDA_HOME or /usr/local/cuda), the CUDA kernels are compiled into the native module, for
TORCH_CUDA_ARCH_LIST or `8.0;9.0a+PTX`; the module loads without a GPU all the same: it finds the driver at run time.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
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
    avx512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-DQWENOPT_ISA_AVX2=1"]
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
LIBRARIES = ["-ldl"] if sys.platform == "linux" else []
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
CUDA_ARCHES = "8.0;9.0a+PTX"
# As for CPUs: no contraction. qwenopt/cupy_kernels/sources.py compiles the same text with the same options.
NVCC_FLAGS = ["-x", "cu", "-std=c++17", "-fmad=false", "-fatbin"]
# The whole table is of this module: an image per file, found by the kernels that the file defines.
IMAGE = """asm(".section .rodata\\n.balign 64\\n.hidden qwenopt_image_{stem}\\n.globl qwenopt_image_{stem}\\n"
    "qwenopt_image_{stem}:\\n.incbin \\"{path}\\"\\n.byte 0\\n.previous\\n");
extern "C" const char qwenopt_image_{stem}[];
"""
TABLES = """
namespace qwenopt {{
const CudaImage kCudaImages[] = {{ {images} {{nullptr, nullptr}} }};
const int kNumCudaImages = {num_images};
const CudaKernelName kCudaKernels[] = {{ {kernels} {{nullptr, 0}} }};
const int kNumCudaKernels = {num_kernels};
const char* const kCudaVersion = "{version}";
}}  // namespace qwenopt
"""
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
    files = [*sources("csrc"), *sources("csrc/common"), *sources("csrc/cpu"), *sources("csrc/cuda")]
    return [Extension("qwenopt._C", files, language="c++")]


def find_nvcc() -> str | None:
    """The CUDA compiler, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc") or next((p for h in homes if h and (p := shutil.which("nvcc", path=f"{h}/bin"))), None)


def gencode(arches: str) -> list[str]:
    """nvcc's options for a list as torch writes it: `8.0;9.0a+PTX`. What is below 8.0 is left out."""
    options = []
    for arch in re.split(r"[;\s]+", arches.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            raise CompileError(f"TORCH_CUDA_ARCH_LIST has {arch!r}; qwenopt takes numbers, such as {CUDA_ARCHES}")
        number, special, ptx = match[1] + match[2], match[3], match[4]
        if int(number) < 80:
            continue
        options.append(f"-gencode=arch=compute_{number}{special},code=sm_{number}{special}")
        if ptx:  # without the letter: PTX of a special architecture runs on no later one
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not options:
        raise CompileError(f"TORCH_CUDA_ARCH_LIST is {arches!r}; the CUDA kernels of qwenopt need 8.0 or newer")
    return options


def fat_binary(nvcc: str, source: Path, folder: Path) -> Path:
    """`source` compiled for every architecture asked for."""
    out = folder / f"{source.stem}.fatbin"
    arches = gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHES)
    done = subprocess.run([nvcc, *NVCC_FLAGS, *arches, "-o", str(out), str(source)], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{nvcc} does not compile {source.name}: {done.stderr.strip()[-2000:]}")
    return out


def cuda_images(folder: Path) -> str:
    """The text of a file with all CUDA kernels, compiled; empty tables where that cannot be done."""
    nvcc = find_nvcc()
    kernels: dict[Path, list[str]] = {}
    if nvcc is not None:
        for path in sorted((ROOT / "csrc/cuda/kernels").glob("*.cuh")):
            if names := re.findall(r"^QWENOPT_KERNEL\((\w+),", path.read_text(), re.MULTILINE):
                kernels[path] = names
    version, images = "", []
    try:
        if nvcc is not None:
            said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
            version = re.search(r"release (\d+\.\d+)", said)[1]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            images = list(pool.map(lambda path: fat_binary(nvcc, path, folder), kernels))
    except (CompileError, OSError, subprocess.CalledProcessError, TypeError) as error:
        print(f"qwenopt: building without CUDA kernels, since nvcc fails: {error}", file=sys.stderr)
        kernels, version = {}, ""
    names = [(name, i) for i, path in enumerate(kernels) for name in kernels[path]]
    tables = TABLES.format(
        images=" ".join(f'{{"{path.name}", qwenopt_image_{path.stem}}},' for path in kernels),
        num_images=len(kernels),
        kernels=" ".join(f'{{"{name}", {i}}},' for name, i in names),
        num_kernels=len(names),
        version=version,
    )
    bodies = [IMAGE.format(stem=p.stem, path=image.resolve()) for p, image in zip(kernels, images, strict=False)]
    return f'#include "{ROOT}/csrc/cuda/images.h"\n' + "".join(bodies) + tables


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
        images = Path(self.build_temp, "cuda", "images.cpp")
        images.parent.mkdir(parents=True, exist_ok=True)
        images.write_text(cuda_images(images.parent))
        jobs = [([*ext.sources, str(images)], "base", ["-O2", f"-I{pybind11.get_include()}"])]
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
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=[*OPENMP, *LIBRARIES, *(extra or ["-s"])],
            target_lang="c++",
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
