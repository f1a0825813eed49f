"""The torch.compile backend: Dynamo's graph -> raised -> lowered -> a callable."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from qwenopt import eligibility, graphs, report
from qwenopt.errors import QwenoptError
from qwenopt.graphs.misses import is_qwen3, misses, modules_of
from qwenopt.lowering import cuda_graph, direct, inductor, providers
from qwenopt.lowering.cuda_graph_device import graphs_of
from qwenopt.lowering.cuda_graph_inputs import Inputs
from qwenopt.options import Options
from qwenopt.report import Captures, GraphReport

log = logging.getLogger(__name__)


def compile_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile one captured graph; the function behind `torch.compile(backend="qwenopt")`.

    `mode` and `options` are torch.compile's. Further keyword arguments that later torch versions pass (`name=` from
    2.15) are accepted and ignored. Raises OptionError for an option that is not known, and QwenoptError under
    `strict=True` where it would otherwise warn and hand the graph to Inductor.
    """
    return _compile(gm, example_inputs, Options.parse(mode, options))


def _compile(gm: GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    result = GraphReport(index=report.next_index(), num_nodes_before=len(gm.graph.nodes))
    patches = inductor.config_patches(options.mode, options.inductor)
    reason = eligibility.why_not(gm, inputs)
    start = time.perf_counter()
    if reason is None:
        compiled = _raise_and_lower(gm, inputs, options, patches, result)
    else:
        result.reason = f"not rewritten: {reason}"
        compiled = inductor.compile_untouched(gm, inputs, patches)
    result.lower_seconds = time.perf_counter() - start - result.raise_seconds
    _finish(result, options)
    return compiled


def _raise_and_lower(
    gm: GraphModule, inputs: Sequence[Any], options: Options, patches: dict[str, Any], result: GraphReport
) -> Callable[..., Any]:
    saved = copy.copy(gm)
    saved.graph = copy.deepcopy(gm.graph)
    modules = modules_of(gm.graph)
    start = time.perf_counter()
    try:
        ctx = graphs.raise_graph(gm, disable=options.disable, verify=options.verify)
    except Exception as error:
        if options.strict:
            raise QwenoptError(f"raising failed: {error}") from error
        log.warning("qwenopt: raising failed, the graph goes to Inductor as it was", exc_info=True)
        result.reason = f"raising failed: {error}"
        return inductor.compile_untouched(saved, inputs, patches)
    result.raise_seconds = time.perf_counter() - start
    if not _concerns_us(ctx, modules):
        result.reason = "not a Qwen3 graph"
        return inductor.compile_untouched(saved, inputs, patches)
    result.sites, result.misses = ctx.sites, misses(ctx, modules, options.disable)
    result.num_nodes_after = len(gm.graph.nodes)
    _complain(result, options)
    providers.choose(ctx.raised)
    device = eligibility.device_of(inputs)
    result.lowering, result.reason = _choose_lowering(gm, ctx, options, result, device)
    if result.lowering == "inductor":
        return inductor.lower(gm, inputs, ctx.raised, patches)
    ctx.raised = graphs.merge_graph(gm, ctx.raised, disable=options.disable)
    if options.mode == "reduce-overhead" and device.type == "cuda":
        return _capture(gm, inputs, ctx, result, device)
    return direct.lower(gm, ctx.raised, result, device)


def _capture(
    gm: GraphModule, inputs: Sequence[Any], ctx: graphs.Context, result: GraphReport, device: torch.device
) -> Callable[..., Any]:
    """Lower directly, and capture the result as CUDA graphs."""
    reason, places = cuda_graph.why_not(gm, ctx.raised), Inputs.of(gm, inputs, device)
    function = direct.lower(gm, ctx.raised, result, device)
    result.captures = Captures(reason=reason or "")
    if reason is not None:
        log.warning("qwenopt: mode='reduce-overhead' without CUDA graphs: %s", reason)
        return function
    return cuda_graph.Captured(function, places, graphs_of(device), result.captures)


def _concerns_us(ctx: graphs.Context, modules: Mapping[str, str]) -> bool:
    """Whether the graph is Qwen3's: by a module class, or by an op that only Qwen3 spells so."""
    return is_qwen3(dict(modules)) or any(s.op in ("qk_norm_rope", "moe_experts") for s in ctx.sites)


def _complain(result: GraphReport, options: Options) -> None:
    if not result.sites and not options.disable:
        log.warning(
            "qwenopt: graph %d holds Qwen3 modules but nothing in it matched; it runs as with Inductor. %s",
            result.index,
            "; ".join(f"{m.op} at {m.module}: {m.reason}" for m in result.misses[:3]),
        )
    if options.strict and result.misses:
        listed = "; ".join(f"{m.op} at {m.module}: {m.reason}" for m in result.misses)
        raise QwenoptError(f"strict: {len(result.misses)} sites were missed: {listed}")


def _choose_lowering(
    gm: GraphModule, ctx: graphs.Context, options: Options, result: GraphReport, device: torch.device
) -> tuple[str, str]:
    own_modes = (None, "default", *(["reduce-overhead"] if device.type == "cuda" else []))
    unused = sorted(options.inductor) + ([] if options.mode in own_modes else [f"mode={options.mode!r}"])
    if options.lowering == "direct" and unused:
        log.warning("qwenopt: lowering='direct' does not use %s", ", ".join(unused))
    if options.lowering != "auto":
        return options.lowering, "asked for"
    if unused:
        return "inductor", "Inductor options were given"
    if result.misses:
        return "inductor", f"{len(result.misses)} sites were missed"
    left = direct.heavy_leftovers(gm, ctx.raised)
    if left:
        return "inductor", f"heavy nodes not raised: {', '.join(left[:3])}"
    reason = providers.heavy_without_kernel(ctx.raised)
    return ("inductor", reason) if reason is not None else ("direct", "")


def _finish(result: GraphReport, options: Options) -> None:
    log.info("qwenopt: %s", result.line())
    log.debug("qwenopt: %s", report.Report([result]))
    report.record(result)
    if options.report is not None:
        try:
            report.last_report().write(options.report)
        except OSError as error:  # the model must not stop for the sake of its report
            log.warning("qwenopt: the report was not written to %s: %s", options.report, error)


def reset() -> None:
    """Forget reports; called by `torch.compiler.reset()`."""
    report.clear()


compile_graph.reset = reset  # type: ignore[attr-defined]
