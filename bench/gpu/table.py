"""The results of a run as Markdown. What was not measured says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NOT_MEASURED = "not measured"


def rows(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A table: first column to the left, the others to the right."""
    rule = "|".join(["---", *["---:"] * (len(head) - 1)])
    return [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)]


def decode_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """A line for each model: tokens/s and share of the floor, by this backend, `generate`, and Inductor."""
    lines = []
    for found in (value for key, value in results.items() if key.startswith("decode-")):
        cells = [found["model"]]
        for name in ("qwenopt", "qwenopt.generate", "inductor"):
            run = found["runs"].get(name)
            cells.append(f"{run['tokens_per_second']:.0f} ({run['share']:.0%})" if run else _why(found, name))
        mine, theirs = (found["runs"].get(name) for name in ("qwenopt", "inductor"))
        cells.append(f"{theirs['seconds'] / mine['seconds']:.2f}x" if mine and theirs else NOT_MEASURED)
        lines.append(cells)
    return lines


def _why(found: Mapping[str, Any], name: str) -> str:
    reason = found["not"].get(name)
    return f"failed: {reason.replace('|', '/')[:80]}" if reason else NOT_MEASURED


def kernel_rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line for each case: its floor, each implementation with its share of it, and what could not be run."""
    lines = []
    for one in found:
        times = sorted(one["times"].items(), key=lambda item: item[1]["us"])
        texts = [f"{n} {t['us']:.1f} ({t['share']:.0%}{', by calls' if t['by'] != 'graph' else ''})" for n, t in times]
        lacking = [f"{name}: {why}".replace("|", "/") for name, why in one["not"].items()]
        floor = f"{one['floor_us']:.1f}" if one["floor_us"] else NOT_MEASURED
        lines.append([f"{one['op']} {one['case']}", floor, "; ".join(texts) or NOT_MEASURED, "; ".join(lacking)])
    return lines


def markdown(results: Mapping[str, Any]) -> str:
    """The whole page."""
    about, ceilings = results["machine"], results.get("ceilings")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"# {about['device']}",
        "",
        f"Capability {about['capability']}, {about['multiprocessors']} multiprocessors, {about['memory_gb']} GB; "
        f"driver: {about['driver']}; CUDA {about['cuda']}; {about['nvcc'] or 'no nvcc'}; {versions}; "
        f"commit {about['commit']}.",
        "",
    ]
    if ceilings:
        lines.append(
            f"Ceilings of this run: copy {ceilings['gbps']:.0f} GB/s, bfloat16 product {ceilings['tflops']:.0f} "
            f"TFLOP/s, launch in a graph {ceilings['launch_us']:.2f} us."
        )
    else:
        lines.append(f"Ceilings: {NOT_MEASURED}.")
    lines += ["", "## Decoding, one row, 128 tokens of context, tokens/s (share of the floor)", ""]
    head = ("model", "qwenopt", "qwenopt.generate", "Inductor reduce-overhead", "qwenopt / Inductor")
    lines += rows(head, decode_rows(results) or [["all", *[NOT_MEASURED] * 4]])
    lines += ["", "## Kernels, us a call (share of the floor)", ""]
    kernels = kernel_rows(results.get("kernels", [])) or [["all", *[NOT_MEASURED] * 3]]
    lines += rows(("case", "floor", "measured", "not run"), kernels)
    lines += ["", "## Parts of the run", ""]
    parts = [
        [f"{p['part']} {p.get('detail', '')}".strip(), p["ended"], f"{p['seconds']:.0f} s", _last(p)]
        for p in results["parts"]
    ]
    lines += rows(("part", "exit", "time", "last line"), parts)
    return "\n".join(lines) + "\n"


def _last(part: Mapping[str, Any]) -> str:
    said: list[str] = part.get("said") or [""]
    return said[-1].replace("|", "/")[:100]
