"""How the GPU benchmark times a call, on a stand-in for CUDA graphs: by a replay of all of them, or by calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.gpu import timing
from qwenopt.testing.replayed import ReplayedGraphs


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> ReplayedGraphs:
    made = ReplayedGraphs()

    def elapsed(call: Callable[[], object]) -> float:
        call()
        return 48.0

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "CudaGraphs", lambda device: made)
    monkeypatch.setattr(timing, "elapsed", elapsed)
    return made


@pytest.mark.parametrize("error", [None, RuntimeError("operation not permitted when stream is capturing")])
def test_each_set_has_its_turn(graphs: ReplayedGraphs, error: Any) -> None:
    graphs.fails, seen = error, Counter[int]()
    found = timing.each(lambda number: seen.update([number]), [(0,), (1,), (2,), (3,), (4,)])
    assert found == (48.0 / 25, "calls" if error else "graph"), "five times five is the first number from 24 on"
    warmed_up, captured, timed = 1, 1, 1 if error else 2
    assert seen == dict.fromkeys(range(5), 5 * (warmed_up + captured + timed))
