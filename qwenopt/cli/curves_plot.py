"""The plot of `qwenopt calibrate`: accuracy against thinking tokens, a line for each rule. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenopt.cli.curves import Point

SIZE_INCHES, DOTS_PER_INCH = (8.0, 5.0), 110
MARKERS = {"budget": "o", "margin": "s", "loop": "^", "entropy": "v", "probe": "D"}


def missing() -> str | None:
    """What to say where the plot cannot be drawn; None where it can."""
    if find_spec("matplotlib") is not None:
        return None
    return "the plot needs matplotlib, which is not installed; add it by: pip install matplotlib, or pass --no-plot"


def draw(path: Path, title: str, points: Sequence[Point]) -> None:
    """Write a PNG. The figure is made without pyplot, so no state of matplotlib's is touched and no display needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    for rule, marker in MARKERS.items():
        mine = sorted((p.thinking_tokens, 100 * p.accuracy) for p in points if p.rule == rule)
        if mine:
            label = "hard budget" if rule == "budget" else f"{rule} rule"
            axes.plot(*zip(*mine, strict=True), marker=marker, markersize=5, linewidth=1.2, label=label)
    unlimited = next(p for p in points if p.rule == "unlimited")
    axes.axhline(100 * unlimited.accuracy, color="grey", linewidth=0.8, linestyle="--")
    axes.plot([unlimited.thinking_tokens], [100 * unlimited.accuracy], "k*", markersize=12, label="unlimited")
    axes.set(xlabel="thinking tokens, mean", ylabel="right answers, %", title=title)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=DOTS_PER_INCH)
