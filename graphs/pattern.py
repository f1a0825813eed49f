"""Patterns: a small language of expression trees that are compared with FX nodes from the result back to the inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from qwenopt.graphs import spelling


@dataclass
class Match:
    """What a pattern found: captured values by name, the nodes it consumed (the root first), and how far it came."""

    captures: dict[str, Any] = field(default_factory=dict)
    interior: list[Node] = field(default_factory=list)
    deepest: int = 0
    failure: str = ""

    @property
    def root(self) -> Node:
        return self.interior[0]

    def __getitem__(self, name: str) -> Any:
        return self.captures[name]

    def fail(self, reason: str) -> bool:
        """Remember the reason of the attempt that came furthest; always False."""
        if len(self.interior) >= self.deepest:
            self.deepest, self.failure = len(self.interior), reason
        return False

    def consume(self, node: Node) -> None:
        if node not in self.interior:
            self.interior.append(node)


class Pattern:
    """Base of all patterns."""

    def match(self, value: Any, m: Match) -> bool:
        raise NotImplementedError(type(self).__name__)


@dataclass(frozen=True)
class Any_(Pattern):
    """Captures any value under a name; a name seen before must be the same node or an equal constant."""

    name: str

    def match(self, value: Any, m: Match) -> bool:
        if self.name not in m.captures:
            m.captures[self.name] = value
            return True
        seen = m.captures[self.name]
        same = seen is value if isinstance(value, Node) or isinstance(seen, Node) else seen == value
        return same or m.fail(f"{value} where {seen} was seen as {self.name}")


@dataclass(frozen=True)
class Const(Pattern):
    """Matches one constant."""

    value: Any

    def match(self, value: Any, m: Match) -> bool:
        ok = not isinstance(value, Node) and value == self.value
        return ok or m.fail(f"{value} where {self.value} is needed")


@dataclass(frozen=True)
class Number(Pattern):
    """Captures a Python number (not a node) under a name."""

    name: str

    def match(self, value: Any, m: Match) -> bool:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            m.captures[self.name] = value
            return True
        return m.fail(f"{value} where a number is needed for {self.name}")


@dataclass(frozen=True)
class Op(Pattern):
    """Matches a node whose canonical reading is `name` with the given arguments.

    Arguments not named must be absent, None or equal to `allow`. `commutative` tries x and other both ways.
    """

    name: str
    args: dict[str, Pattern]
    commutative: bool = False
    allow: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    bind: str | None = None

    def match(self, value: Any, m: Match) -> bool:
        call = spelling.read(value)
        if call is None or call.name != self.name:
            return m.fail(f"{_show(value)} where {self.name} is needed")
        for key, given in call.args.items():
            if key not in self.args and given is not None and given not in self.allow.get(key, ()):
                return m.fail(f"{self.name} has {key}={given}")
        orders = [("x", "other"), ("other", "x")] if self.commutative else [None]
        for order in orders:
            saved = dict(m.captures), list(m.interior)
            m.consume(value)
            if (self.bind is None or Any_(self.bind).match(value, m)) and self._match_args(call, order, m):
                return True
            m.captures, m.interior = saved
        return False

    def _match_args(self, call: spelling.Call, order: tuple[str, str] | None, m: Match) -> bool:
        for key, pattern in self.args.items():
            source = order[("x", "other").index(key)] if order and key in ("x", "other") else key
            if not pattern.match(call.args.get(source), m):
                return False
        return True


@dataclass(frozen=True)
class List(Pattern):
    """Matches a list or tuple item by item."""

    items: tuple[Pattern, ...]

    def match(self, value: Any, m: Match) -> bool:
        if not isinstance(value, (list, tuple)) or len(value) != len(self.items):
            return m.fail(f"{value} where {len(self.items)} items are needed")
        return all(p.match(v, m) for p, v in zip(self.items, value, strict=True))


@dataclass(frozen=True)
class Cast(Pattern):
    """Sees through any number of pure dtype casts."""

    inner: Pattern

    def match(self, value: Any, m: Match) -> bool:
        saved = dict(m.captures), list(m.interior)
        if self.inner.match(value, m):
            return True
        m.captures, m.interior = saved
        call = spelling.read(value)
        if call is None or call.name != "cast" or not is_dtype_cast(value):
            return False
        m.consume(value)
        return self.match(call.args["x"], m)


@dataclass(frozen=True)
class Bind(Pattern):
    """Matches what `inner` does and captures the whole under a name."""

    name: str
    inner: Pattern

    def match(self, value: Any, m: Match) -> bool:
        return self.inner.match(value, m) and Any_(self.name).match(value, m)


@dataclass(frozen=True)
class When(Pattern):
    """Matches when `inner` does and `test(value, match)` returns None; a string is the reason for a miss."""

    inner: Pattern
    test: Callable[[Any, Match], str | None]

    def match(self, value: Any, m: Match) -> bool:
        if not self.inner.match(value, m):
            return False
        reason = self.test(value, m)
        return reason is None or m.fail(reason)


def is_dtype_cast(node: Node) -> bool:
    """Whether a `to`-like node changes nothing but the dtype (same shape and device, no memory format)."""
    before, after = spelling.fake(node.args[0]), spelling.fake(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.device == after.device and node.kwargs.get("memory_format") is None


def _show(value: Any) -> str:
    if not isinstance(value, Node):
        return str(value)
    call = spelling.read(value)
    if call is not None:
        return call.name
    return value.op if value.op in ("placeholder", "get_attr") else str(getattr(value.target, "__name__", value.target))


# Short forms, so that a pattern reads like the expression it matches.


def any_(name: str) -> Pattern:
    return Any_(name)


def add(x: Pattern, other: Pattern) -> Pattern:
    return Op("add", {"x": x, "other": other}, commutative=True)


def mul(x: Pattern, other: Pattern) -> Pattern:
    return Op("mul", {"x": x, "other": other}, commutative=True)


def unary(name: str, x: Pattern, **allow: tuple[Any, ...]) -> Pattern:
    return Op(name, {"x": x}, allow=allow)


def item(x: Pattern, index: Any, bind: str | None = None) -> Pattern:
    return Op("getitem", {"x": x, "index": index if isinstance(index, Pattern) else Const(index)}, bind=bind)


def square(x: Pattern) -> Pattern:
    return Either((Op("pow", {"x": x, "exponent": Const(2)}), Op("square", {"x": x})))


@dataclass(frozen=True)
class Either(Pattern):
    """Matches the first alternative that does."""

    alternatives: tuple[Pattern, ...]

    def match(self, value: Any, m: Match) -> bool:
        for p in self.alternatives:
            saved = dict(m.captures), list(m.interior)
            if p.match(value, m):
                return True
            m.captures, m.interior = saved
        return False
