"""Files and functions stay small enough to be read in one go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON_FOLDERS = ("qwenopt", "graphs", "triton_kernels", "tests", "bench")
NATIVE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 500

# "path" or "path:function" -> why it may be longer. An entry that is no longer needed fails.
EXCEPTIONS: dict[str, str] = {}


def python_files() -> Iterator[Path]:
    yield from ROOT.glob("*.py")
    for folder in PYTHON_FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.name, lines


def too_long() -> dict[str, str]:
    """Everything over its limit: name -> what it has and what it may have."""
    found = {}
    for path in python_files():
        name, source = str(path.relative_to(ROOT)), path.read_text()
        lines = len(source.splitlines())
        if lines > MAX_FILE_LINES:
            found[name] = f"{lines} lines, at most {MAX_FILE_LINES}"
        for function, lines in long_functions(source):
            found[f"{name}:{function}"] = f"{lines} lines, at most {MAX_FUNCTION_LINES}"
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in NATIVE_SUFFIXES:
            lines = len(path.read_text().splitlines())
            if lines > MAX_KERNEL_LINES:
                found[str(path.relative_to(ROOT))] = f"{lines} lines, at most {MAX_KERNEL_LINES}"
    return found


def test_files_and_functions_are_short() -> None:
    found = {name: why for name, why in too_long().items() if name not in EXCEPTIONS}
    assert not found, "\n".join(f"{name}: {why}" for name, why in found.items())


def test_exceptions_are_needed_and_reasoned() -> None:
    assert set(EXCEPTIONS) <= set(too_long())
    assert all(len(reason.split()) >= 3 for reason in EXCEPTIONS.values())


@pytest.mark.parametrize(("extra", "expected"), [(0, []), (1, [("f", MAX_FUNCTION_LINES + 1)])])
def test_a_long_function_is_found(extra: int, expected: list[tuple[str, int]]) -> None:
    body = "    x = 1\n" * (MAX_FUNCTION_LINES - 1 + extra)
    assert list(long_functions("def f():\n" + body)) == expected
