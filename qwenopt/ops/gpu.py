"""What every kernel for GPUs asks for, whoever compiles it: a device that it is written for, and all tensors on it."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_CAPABILITY = (8, 0)


def no_device() -> str | None:
    """None when there is a GPU that the kernels are written for, else why not."""
    if not torch.cuda.is_available():
        return "no CUDA device; torch.cuda.is_available() is False"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}; the kernels need 8.0 or newer"
    return None


def one_device(**tensors: Tensor | None) -> str | None:
    """None when all tensors lie on one device, else where each lies."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        return "tensors on several devices: " + ", ".join(f"{name} on {device}" for name, device in devices.items())
    return None
