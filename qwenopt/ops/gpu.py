"""What every kernel for GPUs asks for, whoever compiles it: a device that it is written for, and all tensors on it."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_CAPABILITY = (8, 0)


def no_device(device: torch.device | None = None) -> str | None:
    """None when that GPU (default: torch's current one) is one that the kernels are written for, else why not."""
    capability = find_capability(device)
    if isinstance(capability, str):
        return capability
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}; the kernels need 8.0 or newer"
    return None


def find_capability(device: torch.device | None = None) -> tuple[int, int] | str:
    """The compute capability of a GPU, or why there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability(device)
    return f"no CUDA device; torch.cuda.is_available() is False{_why_unavailable()}"


def _why_unavailable() -> str:
    """What torch says of it: no driver, one that is too old, or no GPU."""
    if torch.version.cuda is None:
        return ": this torch was built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:  # whatever it raises is the answer
        return f": {str(error).partition('. ')[0]}"
    return ""


def one_device(**tensors: Tensor | None) -> str | None:
    """None when all tensors lie on one device, else where each lies."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        return "tensors on several devices: " + ", ".join(f"{name} on {device}" for name, device in devices.items())
    return None
