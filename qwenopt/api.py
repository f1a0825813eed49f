"""`qwenopt.compile` and `qwenopt.explain`: the backend in one call."""

from __future__ import annotations

import types
from typing import Any

import torch

from qwenopt.backend import compile_graph
from qwenopt.errors import QwenoptError
from qwenopt.report import GraphReport, Report, last_report


def _use_grouped_experts(model: torch.nn.Module) -> None:
    """Switch eager experts, whose loop over `nonzero` breaks the graph, to the grouped_mm spelling."""
    config = getattr(model, "config", None)
    eager = getattr(config, "_experts_implementation", None) == "eager"
    if eager and getattr(config, "num_experts", 0):  # a dense model says "eager" too, and refuses to be switched
        model.set_experts_implementation("grouped_mm")  # type: ignore[operator]


def compile(
    model: torch.nn.Module, *, fullgraph: bool = False, dynamic: bool | None = None, **options: Any
) -> torch.nn.Module:
    """Compile `model` in place with this backend and return it; `model(...)` and `model.generate(...)` then use it.

    Mixture-of-experts models with the eager experts loop are switched to grouped_mm, which can be captured. `options`
    are the backend's (see `qwenopt.options.Options`). Raises OptionError for an unknown one, before anything changes.
    """
    from qwenopt.options import Options

    if not isinstance(model, torch.nn.Module):
        raise QwenoptError(f"compile: {type(model).__name__} given; needed a torch.nn.Module")
    Options.parse(None, options)
    _use_grouped_experts(model)
    model.compile(backend="qwenopt", fullgraph=fullgraph, dynamic=dynamic, options=dict(options))
    return model


def explain(model: torch.nn.Module, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """Run `model(*args, **kwargs)` once through the backend, without gradients, and report what it did to each graph.

    The model keeps whatever compilation it has. Cache arguments are written to, as by any call.
    """
    graphs: list[GraphReport] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled = compile_graph(gm, inputs, options=options)
        graphs.append(last_report().graphs[-1])
        return compiled

    def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module.forward(*args, **kwargs)

    # A code object of its own: Dynamo counts compilations by code object and would stop at the eighth explain.
    fresh = types.FunctionType(call.__code__.replace(), globals(), "explained")
    backend.reset = compile_graph.reset  # type: ignore[attr-defined]
    _use_grouped_experts(model)
    with torch.no_grad():
        torch.compile(fresh, backend=backend)(model, *args, **kwargs)
    return Report(graphs)
