"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.peers.workloads import WORKLOADS

MAX_REASON_CHARACTERS = 600
NOTE = (
    "Medians (smallest - largest) of rounds in which the contenders took turns. x: how many times as fast as qwenopt "
    "in the same rounds. BW: share of the read bandwidth of the round; peak: share of peak bfloat16 arithmetic. "
    "First token: from the start of the process, with imports, loading and compiling, to the token after a prompt of "
    "512. Same tokens: prompts after which the first token is qwenopt's; in bfloat16 a few may differ."
)


def markdown(result: dict[str, Any]) -> str:
    """Title, table, conditions, and the reason of each failure."""
    names = list(result["workloads"])
    header = ["", *(WORKLOADS[name].title for name in names), "first token", "peak memory", "same tokens"]
    rows = [_row(name, entry, names) for name, entry in result["peers"].items()]
    parts = [f"# {result['size']}, random weights, bfloat16", _grid(header, rows), NOTE, _conditions(result)]
    failures = [_failure(name, entry["error"]) for name, entry in result["peers"].items() if entry["error"]]
    return "\n\n".join([*parts, *failures]) + "\n"


def _row(name: str, entry: dict[str, Any], workloads: list[str]) -> list[str]:
    cells = [_speed(entry["workloads"].get(workload), entry["error"]) for workload in workloads]
    first, peak = entry["first_token_seconds"], entry["peak_memory_bytes"]
    return [
        name,
        *cells,
        "-" if first is None else f"{first:.1f} s",
        f"{peak / 1e9:.1f} GB" if peak else "-",
        entry["same_first_tokens"] or "-",
    ]


def _speed(figure: dict[str, Any] | None, error: str | None) -> str:
    if figure is None:
        return "failed" if error else "-"
    speed, ratio = figure["tokens_per_second"], figure["ratio_to_ours"]
    text = f"{speed['median']:.1f} ({speed['low']:.1f} - {speed['high']:.1f}) tok/s"
    if ratio is not None:
        text += f", {ratio['median']:.2f}x ({ratio['low']:.2f} - {ratio['high']:.2f})"
    for key, of in (("share_of_read_bandwidth", "BW"), ("share_of_bf16_peak", "peak")):
        if key in figure:
            text += f", {figure[key]['median']:.0%} of {of}"
    return text


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line = "|".join(["", "---", *("---:" for _ in header[1:]), ""])
    return "\n".join(["| " + " | ".join(row) + " |" if i != 1 else line for i, row in enumerate([header, [], *rows])])


def _conditions(result: dict[str, Any]) -> str:
    machine, read, peak = result["machine"], result["read_gbps"], result["peak"]
    versions = "; ".join(f"{name}: {_versions(entry)}" for name, entry in result["peers"].items() if entry["versions"])
    groups = "; ".join(", ".join(group) for group in result["groups"])
    read_text = f"{read['median']:.1f} ({read['low']:.1f} - {read['high']:.1f}) GB/s" if read else "not measured"
    return "\n".join(
        [
            f"* {machine['date']}, {machine['cpu']} ({machine['isa']}), {machine['cores']} cores, "
            f"{machine['threads']} threads, {machine['memory_bytes'] / 1e9:.0f} GB",
            f"* {result['rounds']} rounds, {result['steps']} decode steps after 32 tokens; "
            f"compile caches {'empty' if result['cold'] else 'kept from earlier runs'}",
            f"* read bandwidth {read_text}; peak {peak['register_gflops']:.0f} GFLOP/s from vector registers, "
            f"{peak['matmul_gflops']:.0f} in torch's matrix product",
            f"* side by side: {groups}",
            f"* {versions}",
        ]
    )


def _versions(entry: dict[str, Any]) -> str:
    return ", ".join(f"{package} {version}" for package, version in entry["versions"].items() if version)


def _failure(name: str, error: str) -> str:
    text = error if len(error) <= MAX_REASON_CHARACTERS else "... " + error[-MAX_REASON_CHARACTERS:]
    return f"`{name}` failed:\n\n```text\n{text}\n```"
