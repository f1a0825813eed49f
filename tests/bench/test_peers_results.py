"""Figures and tables: ratios of the same rounds, shares, and failures that are shown with their reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.peers import table, workloads
from bench.peers.results import Limits, Start, figures
from bench.peers.rounds import Samples
from bench.peers.workloads import WORKLOADS, Cost
from qwenopt.testing.models import tiny_model

STEPS = 16
COST = Cost(weight_bytes=1000, step_bytes={1: 10**9, 8: 2 * 10**9}, prefill_flops=10**12)
LIMITS = Limits(register_gflops=500.0, matmul_gflops=2000.0)


def samples() -> Samples:
    """Two groups: `fast` beside ours in rounds 0 and 1, `slow` in 2 and 3, when the machine was half as fast."""
    made = Samples(gbps={0: 40.0, 1: 40.0, 2: 20.0, 3: 20.0})
    for i, ours, other in ((0, 1.0, 0.5), (1, 1.0, 0.8), (2, 2.0, 4.0), (3, 2.0, 4.0)):
        made.add("decode", "qwenopt", i, ours)
        made.add("decode", "fast" if i < 2 else "slow", i, other)
    made.add("prefill", "qwenopt", 0, 1.0)
    return made


def result(found: dict[str, Any]) -> dict[str, Any]:
    spread = {"median": 30.0, "low": 20.0, "high": 40.0, "samples": 4}
    machine = {"date": "2026-01-01", "cpu": "CPU", "isa": "avx2", "cores": 2, "threads": 2, "memory_bytes": 8 * 10**9}
    return {
        "size": "0.6b",
        "machine": machine,
        "rounds": 2,
        "steps": STEPS,
        "cold": False,
        "workloads": {name: {} for name in ("decode", "prefill")},
        "groups": [["qwenopt", "fast"], ["qwenopt", "slow"]],
        "read_gbps": spread,
        "peak": {"register_gflops": 500.0, "matmul_gflops": 2000.0},
        "peers": found,
    }


def starts() -> dict[str, Start]:
    return {
        "qwenopt": Start({"qwenopt": "0.1.0"}, 2.0, 5.0, [1, 2], 2 * 10**9),
        "fast": Start({"fast": "9.9", "absent": None}, 2.0, 7.0, [1, 3], 3 * 10**9),
        "slow": Start(),
        "broken": Start(error="`pip install ...` ended with exit status 1:\nno such version"),
    }


def test_ratios_and_shares_are_those_of_the_same_round() -> None:
    found = figures(samples(), starts(), "qwenopt", COST, LIMITS, STEPS)
    fast, slow = (found[name]["workloads"]["decode"] for name in ("fast", "slow"))
    assert fast["ratio_to_ours"] == {"median": 1.625, "low": 1.25, "high": 2.0, "samples": 2}
    assert slow["ratio_to_ours"]["median"] == 0.5
    assert slow["tokens_per_second"]["median"] == STEPS / 4.0
    assert slow["share_of_read_bandwidth"]["median"] == pytest.approx(STEPS / 4.0 / 20.0)
    assert found["qwenopt"]["workloads"]["prefill"]["share_of_bf16_peak"]["median"] == pytest.approx(0.5)


def test_a_failed_peer_stays_in_the_table_with_its_reason() -> None:
    found = figures(samples(), starts(), "qwenopt", COST, LIMITS, STEPS)
    text = table.markdown(result(found))
    (row,) = [line for line in text.splitlines() if line.startswith("| broken")]
    assert row.count("failed") == 2
    assert "`broken` failed:\n\n```text\n`pip install ...` ended with exit status 1:\nno such version\n```" in text
    assert "`fast` failed" not in text


def test_one_that_broke_later_keeps_its_figures_and_shows_the_reason() -> None:
    broke = samples()
    broke.errors["fast"] = "the process ended"
    text = table.markdown(result(figures(broke, starts(), "qwenopt", COST, LIMITS, STEPS)))
    (row,) = [line for line in text.splitlines() if line.startswith("| fast")]
    assert "26.0 (20.0 - 32.0) tok/s, 1.62x (1.25 - 2.00), 65% of BW" in row
    assert "`fast` failed:\n\n```text\nthe process ended\n```" in text


def test_the_table_has_all_columns_in_every_row() -> None:
    text = table.markdown(result(figures(samples(), starts(), "qwenopt", COST, LIMITS, STEPS)))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {7}
    assert "1/2" in rows[3]
    assert "7.0 s | 3.0 GB" in rows[3]
    assert "fast: fast 9.9" in text


def test_a_failure_before_any_round_gives_a_table_too() -> None:
    failed = {"qwenopt": Start(error="no checkpoint")}
    found = figures(Samples(), failed, "qwenopt", COST, LIMITS, STEPS)
    text = table.markdown(result(found) | {"read_gbps": None, "groups": []})
    assert "read bandwidth not measured" in text
    assert "no checkpoint" in text


def test_long_reasons_keep_their_end() -> None:
    failed = {"qwenopt": Start(), "long": Start(error="x" * 5000 + "the end")}
    text = table.markdown(result(figures(Samples(), failed, "qwenopt", COST, LIMITS, STEPS)))
    assert "the end\n```" in text
    assert len(text) < 3000


def test_requests_are_the_same_for_everyone() -> None:
    load = WORKLOADS["decode8"]
    first, second = (load.request(1000, STEPS) for _ in range(2))
    assert first == second
    assert [len(prompt) for prompt in first["prompts"]] == [32] * 8
    assert all(0 <= token < 1000 for prompt in first["prompts"] for token in prompt)
    assert load.tokens(STEPS) == 8 * STEPS
    assert WORKLOADS["prefill"].tokens(STEPS) == 512


def test_expected_share_of_experts() -> None:
    assert workloads.expected_share(128, 8, 1) == pytest.approx(8 / 128)
    assert workloads.expected_share(2, 1, 2) == pytest.approx(0.75)
    assert workloads.expected_share(4, 4, 3) == 1.0


def test_a_dense_step_reads_all_weights_whatever_the_batch() -> None:
    model = tiny_model("0.6B", torch.bfloat16)
    cost = workloads.cost(model)
    assert cost.step_bytes[1] == cost.step_bytes[8] == cost.weight_bytes == sum(p.nbytes for p in model.parameters())


def test_more_sequences_read_more_experts() -> None:
    model = tiny_model("30B-A3B", torch.bfloat16)
    cost = workloads.cost(model)
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    rest = cost.weight_bytes - experts - model.model.embed_tokens.weight.nbytes
    assert cost.step_bytes[1] == pytest.approx(rest + experts * 4 / 16, abs=2)
    assert cost.step_bytes[8] == pytest.approx(rest + experts * workloads.expected_share(16, 4, 8), abs=2)
