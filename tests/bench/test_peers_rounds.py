"""Taking turns: order, grouping by memory, and contenders that fail on the way."""

from __future__ import annotations

from typing import Any

import pytest

from bench.peers.peer import PeerError
from bench.peers.rounds import Samples, groups, order, run


class Fake:
    """Answers after a number of seconds that it makes up, until it breaks."""

    def __init__(self, name: str, calls: list[str], breaks_after: int | None = None) -> None:
        self._name, self._calls, self._left = name, calls, breaks_after

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._left == 0:
            raise PeerError(f"{self._name} is broken")
        if self._left is not None:
            self._left -= 1
        self._calls.append(f"{request['kind']} {self._name}")
        return {"seconds": 2.0, "first_tokens": []}


def test_everyone_begins_and_everyone_ends_equally_often() -> None:
    rounds = [order(["a", "b", "c"], i) for i in range(6)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    for place in (0, -1):
        assert sorted(one[place] for one in rounds) == ["a", "a", "b", "b", "c", "c"]
    assert rounds[1] == rounds[0][::-1]


def test_all_run_together_where_memory_allows() -> None:
    assert groups({"ours": 2, "a": 3, "b": 3}, "ours", 8) == [["ours", "a", "b"]]


def test_every_group_has_ours() -> None:
    needs = {"a": 3.0, "ours": 2.0, "b": 3.0, "huge": 100.0, "c": 1.0}
    assert groups(needs, "ours", 8) == [["ours", "a", "b"], ["ours", "huge"], ["ours", "c"]]
    assert groups({"ours": 2.0}, "ours", 8) == [["ours"]]


def test_a_round_asks_everyone_for_every_workload() -> None:
    calls: list[str] = []
    samples = Samples()
    requests = {"decode": {"kind": "decode"}, "prefill": {"kind": "prefill"}}
    run({name: Fake(name, calls) for name in "ab"}, requests, range(3, 5), lambda: 40.0, samples, settle_seconds=0)
    assert calls[:4] == ["decode a", "decode b", "prefill a", "prefill b"] or calls[0] == "decode b"
    assert len(calls) == 8
    assert samples.gbps == {3: 40.0, 4: 40.0}
    assert samples.seconds["prefill"] == {"a": {3: 2.0, 4: 2.0}, "b": {3: 2.0, 4: 2.0}}


def test_one_that_breaks_is_noted_and_the_others_go_on() -> None:
    calls: list[str] = []
    samples = Samples()
    contenders = {"a": Fake("a", calls), "b": Fake("b", calls, breaks_after=1)}
    run(contenders, {"decode": {"kind": "decode"}}, range(3), lambda: 40.0, samples, settle_seconds=0)
    assert samples.errors == {"b": "b is broken"}
    assert set(samples.seconds["decode"]["a"]) == {0, 1, 2}
    assert set(samples.seconds["decode"]["b"]) == {0}


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c", "d", "e"]])
def test_rotation_reaches_every_start(names: list[str]) -> None:
    assert {order(names, i)[0] for i in range(2 * len(names))} == set(names)
