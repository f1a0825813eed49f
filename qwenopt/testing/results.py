"""What a call of an op gives, whether it returns it or writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from qwenopt.ops.op import Op


def results(op: Op, call: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The tensors that `call(*args)` returns, then those it wrote. `args` stay as they are."""
    names = list(op.signature.parameters)
    written = [i for i, name in enumerate(names) if name in op.mutates and isinstance(args[i], Tensor)]
    own = tuple(copy_of(a) if i in written else a for i, a in enumerate(args))
    returned = call(*own)
    if returned is None:
        returned = ()
    return (*(returned if isinstance(returned, (tuple, list)) else (returned,)), *(own[i] for i in written))


def copy_of(x: Tensor) -> Tensor:
    """The same values in other memory, at the same strides."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    flat = x.as_strided((span,), (1,)).clone()
    return flat.as_strided(x.shape, x.stride())
