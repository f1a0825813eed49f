"""Options of the backend: parsed once per compilation, unknown keys refused with the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from qwenopt.errors import OptionError

LOWERINGS = ("auto", "direct", "inductor")
OP_NAMES = (
    "rms_norm",
    "add_rms_norm",
    "qk_norm_rope",
    "attention",
    "kv_append",
    "paged_attention",
    "silu_mul",
    "moe_route",
    "moe_experts",
    "logit_signals",
    "budget_guard",
    "top_tokens",
    "budget_step",
    "linear",
    "linear_silu_mul",
    "linear_add_rms_norm",
    "linear_group",
    "linear_argmax",
    "qk_norm_rope_append",
    "qk_norm_rope_static_append",
)


@dataclass(frozen=True)
class Options:
    """What a user asked for.

    lowering: "auto" (direct when every heavy node was raised, else Inductor), "direct" or "inductor".
    mode: an Inductor mode, used by the inductor lowering; the direct one captures CUDA graphs under "reduce-overhead".
    disable: names of ops not to raise, or not to merge raised ones into.
    strict: raise an error where the default would warn and fall back to Inductor.
    verify: check each distinct match numerically on random data while compiling.
    weights: None; weight-only quantisation is not in this version.
    report: path of a report file, .json or .html, written after each graph.
    inductor: further keys, each one of `torch._inductor.config`.
    """

    lowering: str = "auto"
    mode: str | None = None
    disable: frozenset[str] = frozenset()
    strict: bool = False
    verify: bool = False
    weights: str | None = None
    report: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Options:
        """Check `mode=` and `options=` of torch.compile. Raises OptionError; never changes the caller's dict."""
        given = dict(options or {})
        if mode is not None:
            if given.get("mode", mode) != mode:
                raise OptionError(f"mode={mode!r} and options={{'mode': {given['mode']!r}}} differ; give one of them")
            given["mode"] = mode
        own = {f.name for f in fields(cls)} - {"inductor"}
        mine = {k: v for k, v in given.items() if k in own}
        rest = {k: v for k, v in given.items() if k not in own}
        _check_inductor_keys(rest, own)
        if "disable" in mine:
            mine["disable"] = _op_names(mine["disable"])
        _check_values(mine)
        return cls(**mine, inductor=rest)


def _op_names(value: Any) -> frozenset[str]:
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise OptionError(f"disable={value!r}; needed: a list of op names, as in disable=['linear']")
    for name in value:
        if name not in OP_NAMES:
            raise OptionError(f"disable: unknown op {name!r}{_nearest(name, OP_NAMES)}; ops: {', '.join(OP_NAMES)}")
    return frozenset(value)


def _check_values(given: Mapping[str, Any]) -> None:
    lowering = given.get("lowering", "auto")
    if lowering not in LOWERINGS:
        raise OptionError(f"lowering={lowering!r}; needed: one of {', '.join(LOWERINGS)}")
    for name in ("strict", "verify"):
        if not isinstance(given.get(name, False), bool):
            raise OptionError(f"{name}={given[name]!r}; needed: True or False")
    if given.get("weights") is not None:
        raise OptionError(f"weights={given['weights']!r}; this version runs weights as they are: needed None")
    report = given.get("report")
    if report is not None and not str(report).endswith((".json", ".html", ".htm")):
        raise OptionError(f"report={report!r}; needed: a path that ends in .json or .html")
    mode = given.get("mode")
    if mode is not None:
        from torch._inductor import list_mode_options

        modes = list(list_mode_options())
        if mode not in modes and mode != "default":
            raise OptionError(f"mode={mode!r}{_nearest(mode, modes)}; modes: {', '.join(['default', *modes])}")


def _check_inductor_keys(rest: Mapping[str, Any], own: set[str]) -> None:
    if not rest:
        return
    from torch._inductor import config

    known = config.get_config_copy()
    for key in rest:
        if key.replace("-", "_") not in known:
            near = _nearest(key, [*own, *known])
            raise OptionError(f"unknown option {key!r}{near}; options: {', '.join(sorted(own))}, or an Inductor key")


def _nearest(name: Any, known: Any) -> str:
    if not isinstance(name, str):
        return ""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
