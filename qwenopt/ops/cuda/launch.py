"""What a CUDA kernel is started with, whoever starts it: `qwenopt._C`, CuPy, or the emulation of the tests."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# csrc/cuda/kernels/common.cuh says the same of the names, the threads and the structs.
WARP = 32
DTYPE_NAMES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16"}


@dataclass(frozen=True)
class Launch:
    """A kernel by name, the blocks and the threads of each, and its argument struct as bytes."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    args: bytes


Run = Callable[[Launch], None]


def pack(*values: Any) -> bytes:
    """An argument struct: tensors by address (None: 0), integers, floats as doubles; eight bytes each."""
    kinds = "".join("d" if isinstance(v, float) else "q" for v in values)
    return struct.pack(f"={kinds}", *(_number(v) for v in values))


def _number(value: Any) -> int | float:
    if value is None:
        return 0
    return value if isinstance(value, int | float) else value.data_ptr()


def dtype_name(tensor: Any) -> str:
    """How the kernels of this tensor's dtype end."""
    return DTYPE_NAMES[str(tensor.dtype)]
