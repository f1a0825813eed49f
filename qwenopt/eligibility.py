"""Eligibility: may a graph be rewritten at all? If not, it goes to Inductor exactly as it came."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def why_not(gm: GraphModule, inputs: Sequence[Any]) -> str | None:
    """The reason why the graph must not be touched, or None."""
    if os.environ.get("QWENOPT_DISABLE") == "1":
        return "QWENOPT_DISABLE=1"
    tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "gradients may flow (call the model under torch.no_grad() for inference)"
    odd = next((t for t in tensors if not isinstance(t, _PLAIN) or type(t) not in _PLAIN), None)
    if odd is not None:
        return f"tensor subclass {type(odd).__name__}"
    device = next((t.device.type for t in tensors if t.device.type != "cpu"), None)
    if device is not None:
        return f"graphs on {device} are not rewritten in this version"
    return _autocast(gm.graph.nodes)


def _autocast(nodes: Iterable[torch.fx.Node]) -> str | None:
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if any("autocast" in str(getattr(n.target, "__name__", n.target)) and _enables(n) for n in nodes):
        return "autocast inside the graph"
    return None


def _enables(node: torch.fx.Node) -> bool:
    # `torch.amp.autocast_mode._enter_autocast(device, dtype, enabled, cache)`: switching it off is harmless.
    return "_enter_autocast" in str(getattr(node.target, "__name__", "")) and (len(node.args) < 3 or bool(node.args[2]))
