"""Report: what was raised, what was missed and why, which kernel serves each site, and how a graph was lowered."""

from __future__ import annotations

import html
import json
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Site:
    """One raised place: the op, the module it came from, what the match proved, and the provider that serves it.

    `provider` is "reference" when no kernel fits; `fallback` then says why. `merged` is the op whose kernel does the
    work of this site and of others in one, if there is one.
    """

    op: str
    module: str
    note: str = ""
    provider: str = ""
    fallback: str = ""
    merged: str = ""

    @property
    def served(self) -> str:
        """By what: the provider, and the op that it does this as part of."""
        return f"{self.provider}, in {self.merged}" if self.merged else self.provider


@dataclass(frozen=True)
class Miss:
    """One place that should have been raised and was not: the op, the module, and the reason."""

    op: str
    module: str
    reason: str


@dataclass
class Captures:
    """CUDA graphs of one compiled function, counted as it is called.

    graphs: captured so far; replays: calls that were one of them; uncaptured: calls that started kernel after kernel;
    evicted: graphs given up for others. `reason`: why nothing more is captured, if so.
    """

    graphs: int = 0
    replays: int = 0
    uncaptured: int = 0
    evicted: int = 0
    reason: str = ""

    def line(self) -> str:
        """A few words for the log."""
        text = f"CUDA graphs {self.graphs}, replayed {self.replays} times, calls without {self.uncaptured}"
        text += f", evicted {self.evicted}" if self.evicted else ""
        return f"{text} (no more: {self.reason})" if self.reason else text


@dataclass
class GraphReport:
    """What happened to one captured graph.

    Under the direct lowering `plan_steps` holds the number of steps of each plan (native calls made as one), and
    `plan_breaks` why nodes between raised ones are called from Python instead, with how many there are. `captures` is
    there under mode="reduce-overhead" on a GPU, and goes on counting.
    """

    index: int
    lowering: str = "inductor"
    reason: str = ""
    sites: list[Site] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    plan_steps: list[int] = field(default_factory=list)
    plan_breaks: dict[str, int] = field(default_factory=dict)
    captures: Captures | None = None
    num_nodes_before: int = 0
    num_nodes_after: int = 0
    raise_seconds: float = 0.0
    lower_seconds: float = 0.0

    @property
    def counts(self) -> dict[str, int]:
        """Raised sites by op, in order of first appearance."""
        return dict(Counter(s.op for s in self.sites))

    @property
    def merged(self) -> dict[str, int]:
        """Sites whose work a kernel of another op does, by that op."""
        return dict(Counter(s.merged for s in self.sites if s.merged))

    def line(self) -> str:
        """One line for the log."""
        raised = ", ".join(f"{op} {n}" for op, n in self.counts.items()) or "nothing raised"
        providers = ", ".join(f"{p} {n}" for p, n in Counter(s.provider for s in self.sites if s.provider).items())
        parts = [f"graph {self.index}: {raised}", f"lowering {self.lowering}"]
        if self.reason:
            parts[-1] += f" ({self.reason})"
        if providers:
            parts.append(f"providers {providers}")
        if any(s.merged for s in self.sites):
            parts.append("merged " + ", ".join(f"{op} {n}" for op, n in self.merged.items()))
        if self.plan_steps:
            parts.append(f"plans of {', '.join(map(str, self.plan_steps))} steps")
        if self.captures is not None:
            parts.append(self.captures.line())
        if self.misses:
            parts.append(f"{len(self.misses)} missed")
        return "; ".join(parts)


@dataclass
class Report:
    """The report of one or more graphs of one compilation."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Raised sites by op over all graphs."""
        return dict(Counter(s.op for s in self.sites))

    @property
    def sites(self) -> list[Site]:
        return [s for g in self.graphs for s in g.sites]

    @property
    def misses(self) -> list[Miss]:
        return [m for g in self.graphs for m in g.misses]

    @property
    def fallbacks(self) -> list[Site]:
        """Raised sites that no kernel serves, so that the reference runs there."""
        return [s for s in self.sites if s.fallback]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts and lists."""
        return {"counts": self.counts, "graphs": [asdict(g) | {"counts": g.counts} for g in self.graphs]}

    def __str__(self) -> str:
        lines = ["qwenopt report"]
        for g in self.graphs:
            lines.append(f"  {g.line()}")
            lines += [f"    missed {m.op} at {m.module}: {m.reason}" for m in g.misses]
            lines += [f"    fallback {s.op} at {s.module}: {s.fallback}" for s in g.sites if s.fallback]
        return "\n".join(lines)

    def to_html(self, path: str | Path) -> None:
        """Write a self-contained page with the counts, every site, every miss."""
        rows = [_row("th", ("graph", "op", "module", "provider", "note"))]
        for g in self.graphs:
            rows += [_row("td", (g.index, s.op, s.module, s.served, s.fallback or s.note)) for s in g.sites]
            rows += [_row("td", (g.index, m.op, m.module, "missed", m.reason), "miss") for m in g.misses]
        lines = "".join(f"<p>{html.escape(g.line())}</p>" for g in self.graphs)
        Path(path).write_text(_PAGE.format(lines=lines, rows="\n".join(rows)), encoding="utf-8")

    def write(self, path: str | Path) -> None:
        """Write as HTML when the name ends in .html, else as JSON."""
        if str(path).endswith((".html", ".htm")):
            self.to_html(path)
        else:
            Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


_PAGE = """<!doctype html><meta charset="utf-8"><title>qwenopt report</title>
<style>body{{font:14px sans-serif;margin:2em}}table{{border-collapse:collapse}}
td,th{{border:1px solid #ccc;padding:2px 8px;text-align:left}}tr.miss{{background:#fee}}</style>
<h1>qwenopt report</h1>{lines}<table>{rows}</table>
"""


def _row(tag: str, cells: Iterable[Any], css: str = "") -> str:
    body = "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells)
    return f'<tr class="{css}">{body}</tr>' if css else f"<tr>{body}</tr>"


# The one piece of state that outlives a call: the reports of the latest graphs, for `last_report`. Bounded, so that a
# long-lived process does not grow.
_RECENT: deque[GraphReport] = deque(maxlen=64)


def next_index() -> int:
    """The index of the next graph: they count from 0 since the last reset."""
    return _RECENT[-1].index + 1 if _RECENT else 0


def record(report: GraphReport) -> None:
    """Remember a finished graph's report for `last_report`."""
    _RECENT.append(report)


def clear() -> None:
    """Forget all reports (called by `torch.compiler.reset()` through the backend's `reset`)."""
    _RECENT.clear()


def last_report() -> Report:
    """The reports of the graphs compiled since the last reset (at most 64), oldest first."""
    return Report(list(_RECENT))
