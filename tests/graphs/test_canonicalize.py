"""What does nothing leaves the graph; what only looks like it stays."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qwenopt.testing.capture import capture


def left(fn: Callable[..., Any], *args: Tensor) -> list[Any]:
    """Targets of the calls in the raised graph, whose result must have eager's bits: the same operation gives it."""
    captured = capture(fn, *args)
    torch.testing.assert_close(captured.result, fn(*args), rtol=0, atol=0)
    (ctx,) = captured.contexts
    return [node.target for node in ctx.graph.nodes if node.op.startswith("call_")]


def test_casts_to_what_is_there() -> None:
    assert left(lambda x: x.float().to(torch.float32).to(x.device).neg(), torch.randn(3)) == ["neg"]


@pytest.mark.parametrize(
    "cast", [lambda x: x.double(), lambda x: x.to(torch.float32, copy=True), lambda x: x.to(torch.float32, False, True)]
)
def test_casts_that_make_a_tensor(cast: Callable[[Tensor], Tensor]) -> None:
    assert len(left(lambda x: cast(x).neg(), torch.randn(3))) == 2


def test_questions_that_dynamo_has_answered() -> None:
    """As transformers asks before it calls grouped_mm on a GPU: the graph keeps the call and drops its result."""

    def fn(x: Tensor) -> Tensor:
        capable = torch.cuda.get_device_capability(torch.device("cuda", 0)) >= (8, 0)
        return x.neg() if capable else x.abs()

    with mock.patch.object(torch.cuda, "get_device_properties", return_value=SimpleNamespace(major=9, minor=0)):
        assert left(fn, torch.randn(3)) == ["neg"]
