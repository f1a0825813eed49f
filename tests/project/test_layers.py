"""Who may import whom: kernels know nothing of graphs, ops know kernels, graphs and runtime know ops."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Folder in the repository -> package it is installed as. The first two lie inside the third on the import path only.
PACKAGES = {"triton_kernels": "qwenopt.triton_kernels", "graphs": "qwenopt.graphs", "qwenopt": "qwenopt"}
ANYWHERE = ("numpy", "torch", *sys.stdlib_module_names)


@dataclass(frozen=True)
class Import:
    """One imported name: `module` is absolute, `lazy` means inside a function or under TYPE_CHECKING."""

    module: str
    line: int
    lazy: bool


def module_name(path: Path, root: Path) -> str:
    folder, *rest = path.relative_to(root).with_suffix("").parts
    parts = [PACKAGES[folder], *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _absolute(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parents = package.split(".")
        parents = parents[: len(parents) - node.level + 1]
        base = ".".join([*parents, base] if base else parents)
    # `from qwenopt import native` names a module, `from qwenopt.errors import OptionError` a member: both begin alike.
    return [f"{base}.{alias.name}" for alias in node.names]


def imports(source: str, package: str) -> Iterator[Import]:
    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module in _absolute(node, package):
                yield Import(module, node.lineno, lazy)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        lazy = lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    return visit(ast.parse(source), False)


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def check_triton_kernels(found: Import) -> bool:
    return within(found.module, "triton", "qwenopt.triton_kernels", *ANYWHERE)


def check_ops(found: Import) -> bool:
    if within(found.module, "qwenopt.triton_kernels", "triton"):
        return found.lazy
    own = ("qwenopt.ops", "qwenopt.native", "qwenopt.errors", "qwenopt.cupy_kernels")
    return within(found.module, *own, *ANYWHERE)


def check_graphs(found: Import) -> bool:
    own = ("qwenopt.graphs", "qwenopt.ops", "qwenopt.options", "qwenopt.report", "qwenopt.errors")
    return within(found.module, *own, *ANYWHERE)


def check_runtime(found: Import) -> bool:
    above = ("graphs", "backend", "api", "cli", "triton_kernels", "demo")
    return not within(found.module, *(f"qwenopt.{name}" for name in above))


def check_anything(found: Import) -> bool:
    return not within(found.module, "tests", "bench", "graphs", "triton_kernels", "qwenopt._C")


RULES: dict[str, Callable[[Import], bool]] = {
    "qwenopt.triton_kernels": check_triton_kernels,
    "qwenopt.ops": check_ops,
    "qwenopt.graphs": check_graphs,
    "qwenopt.runtime": check_runtime,
}


def offences(source: str, module: str, is_package: bool) -> list[str]:
    """Every import in `source` that the layer of `module` forbids, as `module:line imports what`."""
    package = module if is_package else module.rpartition(".")[0]
    rules = [rule for layer, rule in RULES.items() if within(module, layer)]
    if module != "qwenopt.native":
        rules.append(check_anything)
    found = imports(source, package)
    return [f"{module}:{one.line} imports {one.module}" for one in found if not all(rule(one) for rule in rules)]


def sources() -> list[Path]:
    return sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))


def test_imports_point_downwards() -> None:
    found = [
        line
        for path in sources()
        for line in offences(path.read_text(), module_name(path, ROOT), path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qwenopt.triton_kernels.silu_mul", "import qwenopt.ops"),
        ("qwenopt.triton_kernels.silu_mul", "def f():\n    from ..native import C"),
        ("qwenopt.triton_kernels.silu_mul", "import transformers"),
        ("qwenopt.ops.silu_mul", "from qwenopt.triton_kernels import silu_mul"),
        ("qwenopt.ops.silu_mul", "from qwenopt.graphs import base"),
        ("qwenopt.ops.silu_mul", "def f():\n    from qwenopt import backend"),
        ("qwenopt.graphs.silu_mul", "from qwenopt.runtime import kv_cache"),
        ("qwenopt.graphs.silu_mul", "from qwenopt import native"),
        ("qwenopt.runtime.generate", "def f():\n    import qwenopt.backend"),
        ("qwenopt.runtime.generate", "from ..graphs import base"),
        ("qwenopt.backend", "from qwenopt import _C"),
        ("qwenopt.backend", "import qwenopt._C"),
        ("qwenopt.backend", "import tests.helpers"),
        ("qwenopt.backend", "from graphs import base"),
    ],
)
def test_an_import_upwards_is_found(module: str, source: str) -> None:
    assert len(offences(source, module, is_package=False)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qwenopt.ops.silu_mul", "def f():\n    from qwenopt.triton_kernels import silu_mul"),
        ("qwenopt.ops.silu_mul", "from qwenopt import native\nfrom .op import Op"),
        ("qwenopt.graphs.silu_mul", "from qwenopt.ops import OPS\nimport torch.fx"),
        ("qwenopt.native", "from qwenopt import _C"),
        ("qwenopt.backend", "from qwenopt.graphs import base"),
    ],
)
def test_an_import_downwards_is_fine(module: str, source: str) -> None:
    assert not offences(source, module, is_package=False)


# Kernels are compiled once per instruction set: inline code of a shared header would leak, say, AVX-512 into the rest
# of the binary. They neither allocate nor know torch or Python.
FORBIDDEN_HEADER = re.compile(
    r"torch/|ATen/|c10/|pybind11|Python\.h|numpy/"
    r"|(algorithm|any|array|deque|format|forward_list|fstream|functional|iostream|list|map|memory|memory_resource|mutex"
    r"|numeric|optional|ostream|queue|regex|set|span|sstream|stack|stdexcept|string|string_view|thread|tuple"
    r"|unordered_map|unordered_set|utility|valarray|variant|vector)$"
)
INCLUDE = re.compile(r"^\s*#\s*include\s*[<\"]([^>\"]+)[>\"]", re.MULTILINE)


def forbidden_includes(text: str) -> list[str]:
    return [header for header in INCLUDE.findall(text) if FORBIDDEN_HEADER.match(header)]


def test_kernels_include_no_torch_no_python_no_containers() -> None:
    kernels = [path for kind in ("cpu", "cuda") for path in (ROOT / "csrc" / kind / "kernels").glob("**/*.*")]
    found = [
        f"{path.relative_to(ROOT)} includes {header}"
        for path in kernels
        if path.suffix in {".h", ".hpp", ".cpp", ".cu", ".cuh"}
        for header in forbidden_includes(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_a_forbidden_include_is_found() -> None:
    text = '#include <vector>\n  # include <torch/extension.h>\n#include <cstdint>\n#include "silu_mul.h"\n'
    assert forbidden_includes(text) == ["vector", "torch/extension.h"]
