"""Random checkpoints: what transformers would load, written whole or not at all; and the measurement built on them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenopt import cli
from qwenopt.cli import checkpoint as checkpoints
from qwenopt.cli import cold, demo_size, speed
from qwenopt.errors import QwenoptError
from qwenopt.testing import fullsize
from qwenopt.testing.models import full_config, tiny_config


def tiny(name: str) -> Any:
    config = tiny_config(name, max_position_embeddings=1024)
    config.dtype = torch.bfloat16
    return config


@pytest.mark.parametrize("name", ["0.6B", "8B", "30B-A3B"])
@pytest.mark.parametrize("shard_bytes", [fullsize.SHARD_BYTES, 50_000])
def test_transformers_loads_what_is_built(
    name: str, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fullsize, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(fullsize, "BLOCK_ELEMENTS", 1000)
    config, seen = tiny(name), []
    folder = fullsize.build(config, tmp_path / "built", seen.append)
    assert (folder / "model.safetensors").exists() == (shard_bytes > 50_000)
    model = checkpoints.load(folder)
    assert model.dtype == torch.bfloat16
    assert 2 * checkpoints.parameters(model) == fullsize.total_bytes(config) == seen[-1]
    for key, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), key
        else:
            assert abs(p.float().std().item() - fullsize.STD) < fullsize.STD / 4, key


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fullsize.build(tiny("0.6B"), tmp_path / "built", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "built.tmp-999999999"
    left.mkdir()
    fullsize.build(tiny("0.6B"), tmp_path / "built")
    assert [path.name for path in tmp_path.iterdir()] == ["built"]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fullsize.shutil, "disk_usage", lambda path: argparse.Namespace(free=10))
    with pytest.raises(QwenoptError, match=r"has 0\.0 GB free; needed: .* set XDG_CACHE_HOME"):
        fullsize.build(tiny("0.6B"), tmp_path / "built")


def test_sizes() -> None:
    assert fullsize.total_bytes(fullsize.SIZES["0.6b"].config()) == 2 * 596_049_920
    with pytest.raises(QwenoptError, match=r"size '7b'; needed: one of 0\.6b, 30b-a3b-4l"):
        fullsize.ensure("7b")


def test_cache_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert fullsize.cache_root() == Path("/somewhere/qwenopt")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert fullsize.cache_root() == Path.home() / ".cache" / "qwenopt"


def test_bytes_and_operations_of_a_full_model() -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(full_config("0.6B"), dtype=torch.bfloat16)
        moe = AutoModelForCausalLM.from_config(full_config("30B-A3B", num_hidden_layers=1), dtype=torch.bfloat16)
    assert speed.bytes_per_token(dense) == 2 * 596_049_920
    experts = 8 * 3 * 2048 * 768
    attention = 2048 * 128 * (32 + 4 + 4 + 32)
    norms = 2 * 2048 + 2 * 128 + 2048
    assert speed.bytes_per_token(moe) == 2 * (experts + attention + norms + 128 * 2048 + 151936 * 2048)
    per_token = 28 * (1024 * 128 * (16 + 8 + 8 + 16) + 3 * 1024 * 3072)
    assert speed.prefill_flops(dense, 1) == 2 * per_token + 2 * 16 * 128 * 28 + 2 * 151936 * 1024


def test_logit_error() -> None:
    a = torch.tensor([3.0, 4.0])
    assert speed.logit_error(a, a) == 0
    assert speed.logit_error(a * 1.5, a) == pytest.approx(0.5)
    assert speed.logit_error(a * torch.nan, a) == float("inf")


@pytest.mark.slow
def test_demo_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fullsize.Size, "config", lambda size: tiny(size.model))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start = {"first_token_seconds": 1.0, "second_token_seconds": 2.0, "peak_memory_bytes": 10**9}
    monkeypatch.setattr(cold, "measure", lambda *args: start)
    monkeypatch.setattr(demo_size.measure, "default_read_bytes", lambda: 1 << 20)
    path = tmp_path / "size.json"
    assert cli.main(["demo", "--size", "0.6b", "--rounds", "2", "--json", str(path)]) == 0
    assert "decode tok/s" in capsys.readouterr().out
    data = json.loads(path.read_text())
    for kind, share in (("decode", "share_of_read_bandwidth"), ("prefill", "share_of_bf16_peak")):
        assert set(data[kind]) == {"eager", "qwenopt"}
        assert all(entry[share] > 0 and entry["tokens_per_second"]["samples"] == 2 for entry in data[kind].values())
    assert data["cold"]["qwenopt"] == start
    assert data["logit_error"]["eager"] == 0
    assert data["ceilings"]["read_gbps"]["samples"] == 4
    assert data["report"]["counts"]["silu_mul"] == 4


@pytest.mark.slow
def test_cold_run_in_a_process_of_its_own(checkpoint: Path) -> None:
    result = cold.measure(checkpoint, "eager", "bfloat16", 1)
    assert 0 < result["first_token_seconds"] < result["second_token_seconds"]
    assert result["peak_memory_bytes"] > 10**7


def test_a_cold_run_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QwenoptError, match="the cold run of eager ended with exit status 1"):
        cold.measure(tmp_path, "eager", "bfloat16", 1)
