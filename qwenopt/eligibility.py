"""Eligibility: may a graph be rewritten at all? If not, it goes to Inductor exactly as it came."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from qwenopt.ops import gpu

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
    return _devices(tensors) or _autocast(gm.graph.nodes, device_of(tensors))


def device_of(inputs: Sequence[Any]) -> torch.device:
    """The device that a graph runs on: that of its tensors, of which single numbers may lie on the CPU all the same."""
    devices = (t.device for t in inputs if isinstance(t, torch.Tensor))
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _devices(tensors: Sequence[torch.Tensor]) -> str | None:
    """None when all tensors lie on the CPU or on one GPU that the kernels are written for, else the reason."""
    devices = sorted({t.device for t in tensors if t.device.type != "cpu"}, key=str)
    if not devices:
        return None
    other = next((d.type for d in devices if d.type != "cuda"), None)
    if other is not None:
        return f"graphs on {other} are not rewritten in this version"
    host = sum(t.device.type == "cpu" and t.dim() > 0 for t in tensors)
    if len(devices) > 1 or host:
        places = [*map(str, devices), *([f"cpu ({host} tensors)"] if host else [])]
        return f"tensors on several devices: {', '.join(places)}; a graph is rewritten where one device has them all"
    return gpu.no_device(devices[0])


def _autocast(nodes: Iterable[torch.fx.Node], device: torch.device) -> str | None:
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled(device.type):
        return "autocast is on"
    if any("autocast" in str(getattr(n.target, "__name__", n.target)) and _enables(n) for n in nodes):
        return "autocast inside the graph"
    return None


def _enables(node: torch.fx.Node) -> bool:
    # `torch.amp.autocast_mode._enter_autocast(device, dtype, enabled, cache)`: switching it off is harmless.
    return "_enter_autocast" in str(getattr(node.target, "__name__", "")) and (len(node.args) < 3 or bool(node.args[2]))
