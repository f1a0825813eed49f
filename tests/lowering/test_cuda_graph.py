"""Captured calls: keys, copies, writes, results, eviction and failure, on a stand-in that obeys CUDA graphs' rules."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.lowering import cuda_graph
from qwenopt.lowering.cuda_graph import Captured
from qwenopt.lowering.cuda_graph_inputs import Inputs
from qwenopt.report import Captures
from qwenopt.testing.replayed import ReplayedGraphs


def captured(
    function: Callable[..., Any], *, kept: int = 0, written: tuple[int, ...] = (), copied: int = 1, host: int = 0
) -> Captured:
    """`function(*kept, *copied, *host)` captured."""
    places = range(kept + copied + host)
    kinds = places[:kept], places[kept : kept + copied], places[kept + copied :]
    inputs = Inputs(*map(tuple, kinds), open=tuple(kinds[1]), written=written)
    return Captured(function, inputs, ReplayedGraphs(), Captures())


def counts(c: Captured) -> tuple[int, int, int]:
    return c.counts.graphs, c.counts.replays, c.counts.uncaptured


def test_third_call_of_a_shape_is_replayed_on_what_it_is_given() -> None:
    c = captured(lambda x: (x * 2, x.shape[0]))
    for i in range(6):
        x = torch.full((3,), float(i))
        (out, size) = c(x)
        assert torch.equal(out, 2 * x)
        assert size == 3
    assert counts(c) == (1, 4, 2)


def test_shapes_strides_and_numbers_have_graphs_of_their_own() -> None:
    c = captured(lambda x, n: (x + n,), host=1)
    for _ in range(4):
        for x in (torch.arange(6.0).view(2, 3), torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2).T):
            for n in (1, torch.tensor(0.5)):
                assert torch.equal(c(x, n)[0], x + n)
    assert counts(c) == (6, 12, 12)


def test_a_value_on_the_host_is_part_of_the_key() -> None:
    c = captured(lambda x, n: (x + n,), host=1)
    x = torch.ones(2)
    for value in (1.0, 1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 5.0):
        assert torch.equal(c(x, torch.tensor(value))[0], x + value)
    assert counts(c) == (2, 4, 4)


def test_every_call_writes_once() -> None:
    count, cache = torch.zeros((), dtype=torch.int64), torch.zeros(8)

    def step(count: Tensor, cache: Tensor, x: Tensor) -> tuple[Tensor]:
        cache[count] = x
        count.add_(1)
        return (cache.sum(),)

    c = captured(step, kept=2, written=(0, 1))
    for i in range(8):
        (total,) = c(count, cache, torch.tensor(float(i)))
        assert total == sum(range(i + 1))
    assert torch.equal(cache, torch.arange(8.0))
    assert counts(c) == (1, 6, 2)


def test_moved_memory_means_another_capture() -> None:
    c = captured(lambda weight, x: (weight * x,), kept=1)
    first, second = torch.full((2,), 3.0), torch.full((2,), 5.0)
    for weight in (first, first, first, second, second, second, first):
        assert torch.equal(c(weight, torch.ones(2))[0], weight)
    assert counts(c) == (2, 3, 4)
    first.fill_(9)
    assert torch.equal(c(first, torch.ones(2))[0], first), "changed in place, and seen"


def test_a_fixed_call_is_the_same_call() -> None:
    total, x = torch.zeros(2), torch.ones(2)
    c = captured(lambda total, x: (total.add_(x).clone(),), kept=1, written=(0,))
    again = c.fixed((total, x))
    for i in range(6):
        x.fill_(i)
        assert torch.equal(again()[0], torch.full((2,), i * (i + 1) / 2))
    assert counts(c) == (1, 4, 2)


def test_results_outlive_other_calls() -> None:
    c = captured(lambda x: (x + 1, x * 2))
    small, large = torch.ones(2), torch.ones(3)
    kept = []
    for i in range(12):
        x = (large if i % 2 else small) * i
        kept.append((x, c(x)))
    for x, (a, b) in kept:
        assert torch.equal(a, x + 1)
        assert torch.equal(b, 2 * x)
    assert c.counts.graphs == 2


def test_views_of_inputs_are_the_callers_own() -> None:
    pool = torch.zeros(4)
    c = captured(lambda pool, x: (pool[1:3], x.T, x[1], None), kept=1)
    for i in range(5):
        x = torch.arange(6.0).view(2, 3) + i
        part, turned, row, nothing = c(pool, x)
        assert nothing is None
        part.fill_(i)
        turned[0, 0] = -1
        row[0] = -2
        assert torch.equal(pool, torch.tensor([0.0, i, i, 0.0]))
        assert (x[0, 0], x[1, 0]) == (-1, -2)
    assert c.counts.replays == 3


def test_results_that_share_memory_still_do() -> None:
    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        both = x + 1
        return both, both[1:]

    c = captured(halves)
    for _ in range(4):
        whole, part = c(torch.zeros(3))
        part.fill_(7)
        assert torch.equal(whole, torch.tensor([1.0, 7, 7]))


def test_expanded_inputs() -> None:
    c = captured(lambda x: (x + torch.arange(3.0),))
    for i in range(4):
        x = torch.full((1, 3), float(i)).expand(4, 3)
        assert torch.equal(c(x)[0], x + torch.arange(3.0))
    assert c.counts.replays == 2


def test_a_copied_input_inside_what_is_written_is_not_captured() -> None:
    def shift(cache: Tensor, x: Tensor) -> tuple[Tensor]:
        cache.add_(1)
        return (x + 0,)

    c, cache = captured(shift, kept=1, written=(0,)), torch.zeros(4)
    for i in range(5):
        (seen,) = c(cache, cache[:2])
        assert torch.equal(seen, torch.full((2,), i + 1.0))
    assert c.counts.graphs == 0


def test_few_graphs_are_kept_and_the_latest_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "MOST_GRAPHS", 2)
    c = captured(lambda x: (x + 1,))
    for size in (1, 1, 1, 2, 2, 2, 1, 3, 3, 3):
        assert torch.equal(c(torch.zeros(size))[0], torch.ones(size))
    assert (c.counts.graphs, c.counts.evicted) == (3, 1)
    before = c.counts.replays
    c(torch.zeros(1))
    assert c.counts.replays == before + 1, "2 went, not 1, which was used later"


def test_what_comes_once_evicts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "MOST_SEEN", 3)
    c = captured(lambda x: (x + 1,))
    for size in (1, 1, 1, *range(2, 40), 1):
        c(torch.zeros(size))
    assert counts(c) == (1, 2, 40)


def test_captures_that_do_not_pay_have_an_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_graph, "MOST_UNPAID", 2)
    c = captured(lambda x: (x + 1,))
    with caplog.at_level(logging.WARNING, logger="qwenopt"):
        for size in (1, 2, 3, 4):
            for _ in range(3):
                assert torch.equal(c(torch.zeros(size))[0], torch.ones(size))
    (said,) = caplog.records
    assert "2 graphs were captured" in said.getMessage()
    before = c.counts.replays
    assert torch.equal(c(torch.zeros(1))[0], torch.ones(1))
    assert c.counts.replays == before + 1, "what was captured goes on"


def test_captures_that_pay_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "MOST_UNPAID", 2)
    monkeypatch.setattr(cuda_graph, "PAID", 4)
    c = captured(lambda x: (x + 1,))
    for size in range(1, 30):
        for _ in range(2 + 4):
            assert torch.equal(c(torch.zeros(size))[0], torch.ones(size))
    assert (c.counts.graphs, c.counts.reason) == (29, "")


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted\nwhen stream is capturing"), KeyError()])
def test_a_failed_capture_is_told_and_loses_nothing(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    total = torch.zeros(2)
    c = captured(lambda total, x: (total.add_(x).clone(),), kept=1, written=(0,))
    graphs: Any = c.graphs
    graphs.fails = error
    with caplog.at_level(logging.WARNING, logger="qwenopt"):
        results = [c(total, torch.ones(2))[0] for _ in range(5)]
    assert [float(r[0]) for r in results] == [1, 2, 3, 4, 5]
    (said,) = caplog.records
    assert type(error).__name__ in said.getMessage()
    assert "\n" not in said.getMessage()
    assert counts(c) == (0, 0, 5)


def test_no_memory_for_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    c = captured(lambda x: (x + 1,))
    c(torch.zeros(2))
    monkeypatch.setattr(torch, "empty_strided", full)
    assert torch.equal(c(torch.zeros(2))[0], torch.ones(2))
    assert "CUDA out of memory" in c.counts.reason
