"""Calls of the Triton providers on CPU tensors, in a process of its own in which Triton interprets its kernels.

Whether kernels are compiled or interpreted is settled when Triton is imported, for the whole process; the tests need
both. The interpreter computes with NumPy, in which bfloat16 products are wrong: float16 and float32 only.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import torch

Run = Callable[..., tuple[Any, tuple[Any, ...]]]


def _prepare() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN: whatever is read was written


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _call(name: str, data: bytes) -> bytes:
    stem, _, function = name.partition(".")
    provider = getattr(import_module(f"qwenopt.ops.triton.{stem}"), function or stem)
    args = _unpack(data)
    return _pack((provider(*args), args))


@contextmanager
def interpreter() -> Iterator[Run]:
    """A function `run(name, *args)`: the result of a Triton provider, and the arguments after it.

    The name is that of an op, or `op.function` for another function of the op's module in `qwenopt.ops.triton`.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare) as pool:

        def run(name: str, *args: Any) -> tuple[Any, tuple[Any, ...]]:
            result: tuple[Any, tuple[Any, ...]] = _unpack(pool.submit(_call, name, _pack(args)).result())
            return result

        yield run
