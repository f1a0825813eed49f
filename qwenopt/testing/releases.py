"""Releases of the packages that tests run with, for what differs between them."""

from __future__ import annotations

from types import ModuleType

import transformers


def release(module: ModuleType) -> tuple[int, ...]:
    """Major and minor version of a package: (5, 23) for 5.23.0."""
    return tuple(int(part) for part in module.__version__.split(".")[:2])


TRANSFORMERS = release(transformers)
# The first whose rotary embedding multiplies elementwise (graphs/outer_product.py).
ELEMENTWISE_ROTARY = (5, 19)
