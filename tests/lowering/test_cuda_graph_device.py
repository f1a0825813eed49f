"""How CUDA graphs are asked for, on a torch.cuda that only takes notes: pools, streams, turns, and a failed capture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import pytest
import torch

from qwenopt.lowering.cuda_graph_device import CudaGraphs


class Noted:
    """What was asked of torch.cuda, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes: list[Any] = []
        numbers, notes = count(), self.notes

        class Stream:
            def __init__(self, *_: Any) -> None:
                self.number = next(numbers)

            def wait_stream(self, other: Stream) -> None:
                notes.append(f"{self.number} waits for {other.number}")

        class Graph:
            def replay(self) -> None:
                notes.append("replay")

        @contextmanager
        def graph(_: Any, *, pool: int, stream: Stream, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local", "other threads may go on"
            notes.append(f"capture in pool {pool} on {stream.number}")
            yield

        self.make, pools = Stream, count(100)
        self.current = Stream()
        fakes: dict[str, Any] = {"Stream": Stream, "CUDAGraph": Graph, "graph": graph}
        fakes |= {"graph_pool_handle": lambda: next(pools), "current_stream": lambda: self.current}
        fakes |= {"set_stream": lambda stream: setattr(self, "current", stream)}
        fakes |= {"device": lambda _: nullcontext(), "stream": lambda _: nullcontext()}
        for name, value in fakes.items():
            monkeypatch.setattr(torch.cuda, name, value)
        bindings: dict[str, Any] = {
            "_cuda_clearCublasWorkspaces": lambda: notes.append("no workspaces"),
            "_cuda_endAllocateToPool": self._end,
            "_cuda_releasePool": lambda device, pool: notes.append(f"release pool {pool} of {device}"),
        }
        for name, value in bindings.items():
            monkeypatch.setattr(torch._C, name, value, raising=False)
        self.left_open = False  # what a failed capture leaves, as torch 2.11 does

    def _end(self, device: int, pool: int) -> None:
        if not self.left_open:
            raise RuntimeError(f"endAllocatePool: not currently recording to {pool}")
        self.notes.append(f"end pool {pool} of {device}")

    def taken(self) -> list[Any]:
        notes = list(self.notes)
        self.notes.clear()
        return notes


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    return Noted(monkeypatch)


def test_graphs_share_a_pool_that_a_first_empty_one_keeps(noted: Noted) -> None:
    graphs = CudaGraphs(torch.device("cuda:0"))
    with graphs.turn():
        assert graphs.warm_up(lambda: 3) == 3
        assert noted.taken() == ["1 waits for 0", "0 waits for 1"]
        recording = graphs.capture(lambda: (1,))
        recording.replay()
        graphs.capture(lambda: (2,))
    assert recording.outputs == (1,)
    one = ["no workspaces", "capture in pool 100 on 1", "no workspaces"]
    assert noted.taken() == ["capture in pool 100 on 1", *one, "replay", *one]


def test_another_stream_waits_for_the_last(noted: Noted) -> None:
    graphs = CudaGraphs(torch.device("cuda:0"))
    for _ in range(2):
        with graphs.turn():
            pass
    assert noted.taken() == []
    noted.current = noted.make()
    with graphs.turn():
        pass
    assert noted.taken() == ["2 waits for 0"]


@pytest.mark.parametrize("left_open", [False, True])
def test_after_a_failed_capture_nothing_of_it_is_used(noted: Noted, left_open: bool) -> None:
    graphs, mine = CudaGraphs(torch.device("cuda:0")), noted.current

    def fail() -> None:  # on a stream that torch 2.11 stays on
        noted.current = noted.make()
        noted.left_open = left_open
        raise ZeroDivisionError

    with graphs.turn():
        with pytest.raises(ZeroDivisionError):
            graphs.capture(fail)
        assert noted.current is mine
        ended = ["end pool 100 of 0", "release pool 100 of 0"] if left_open else []
        assert noted.taken()[-len(ended) - 2 :] == ["no workspaces", *ended, "capture in pool 101 on 3"]
        graphs.capture(lambda: ())
    assert noted.taken() == ["no workspaces", "capture in pool 101 on 3", "no workspaces"]


def test_of_a_lost_device_the_first_error_is_told(noted: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = CudaGraphs(torch.device("cuda:0"))

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no capture either")

    def lose() -> None:
        monkeypatch.setattr(torch.cuda, "graph", refuse)
        raise RuntimeError("an illegal memory access")

    with graphs.turn(), pytest.raises(RuntimeError, match="an illegal memory access"):
        graphs.capture(lose)
