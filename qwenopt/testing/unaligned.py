"""Safetensors files whose tensors begin at odd addresses once the file is mapped: the format promises no alignment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {"torch.float32": "F32", "torch.bfloat16": "BF16"}


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` one behind another after two bytes of padding, so that the first begins two past a multiple of 8.

    safetensors' own `save_file` sorts by size of element, which aligns what has even sizes; a file need not.
    """
    import torch

    header: dict[str, Any] = {"padding": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}
    at, data = 2, [b"\0\0"]
    for name, tensor in tensors.items():
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        kind, shape = _NAMES[str(tensor.dtype)], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + len(raw)]}
        at += len(raw)
        data.append(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of such a file, in its mapped memory."""
    from safetensors.torch import load_file

    loaded: dict[str, Tensor] = load_file(path)
    del loaded["padding"]
    return loaded
