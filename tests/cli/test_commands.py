"""demo, generate, explain and plan on a tiny model, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwenopt import cli, native
from qwenopt.cli import stream

pytestmark = pytest.mark.slow


def test_demo_of_a_checkpoint(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "demo.json"
    arguments = ["--max-new-tokens", "6", "--rounds", "2", "--json", str(path), "--prompt", "Hi"]
    assert cli.main(["demo", "--model", str(checkpoint), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "[thinking] Hi" in shown
    assert "[no thinking] Hi" in shown
    assert "the same as eager's" in shown
    data = json.loads(path.read_text())
    assert data["command"] == "demo"
    assert data["equal"]
    assert data["machine"]["versions"]["torch"]
    (model,) = data["models"]
    assert model["architecture"] == "Qwen3ForCausalLM"
    assert [reply["thinking"] for reply in model["replies"]] == [True, False]
    assert all(reply["tokens"] == reply["eager_tokens"] for reply in model["replies"])
    assert model["report"]["graphs"][0]["counts"]["qk_norm_rope"] == 2
    assert model["decode"]["ratio_to_eager"] > 0
    assert model["compile_seconds"] > 0


def test_demo_fails_when_tokens_differ(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other_tokens(call: Any, cache: Any, prompt: Any, limit: int, *rest: Any) -> stream.Reply:
        tokens = [1, 2, 3] if hasattr(call, "config") else [1, 2, 4]
        return stream.Reply(tokens, [0.1] * 3)

    monkeypatch.setattr(stream, "greedy", other_tokens)
    assert cli.main(["demo", "--model", str(checkpoint)]) == 1
    assert "DIFFERENT from eager's from token 2 on" in capsys.readouterr().out
    for dtype in ("bfloat16", "float16"):
        assert cli.main(["demo", "--model", str(checkpoint), "--dtype", dtype]) == 0
        assert f"In {dtype} that is no error" in capsys.readouterr().out


def test_demo_refuses_before_it_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert cli.main(["demo", "--vs", "inductor"]) == 2
    assert cli.main(["demo", "--prompt", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--vs and --no-cold go with --size" in captured.err


def test_generate_streams_to_standard_output(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", str(checkpoint), "--prompt", "Hi", "--max-new-tokens", "8", "--no-thinking"]
    assert cli.main(arguments) == 0
    compiled = capsys.readouterr()
    assert "tokens" in compiled.err
    assert cli.main([*arguments, "--eager", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.strip()
    assert compiled.out.strip()


def test_generate_reads_standard_input(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert cli.main(["generate", "--model", str(checkpoint), "--prompt", "-"]) == 2
    assert "the prompt on standard input is empty" in capsys.readouterr().err


def test_generate_refuses_more_than_the_model_takes(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--model", str(checkpoint), "--prompt", "x", "--max-new-tokens", "512"]) == 2
    assert "the model takes 512" in capsys.readouterr().err


def test_explain(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, data = tmp_path / "x.html", tmp_path / "x.json"
    assert cli.main(["explain", "--model", str(checkpoint), "--html", str(page), "--json", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "silu_mul       4 sites in 2 graphs" in shown
    assert "silu_mul" in page.read_text()
    assert json.loads(data.read_text())["counts"]["silu_mul"] == 4


def test_plan(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    assert "qk_norm_rope" in shown
    assert "def forward(" in shown


@pytest.mark.skipif(native.why_not() is not None, reason="plans are native calls")
def test_plan_times_its_steps(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", str(checkpoint), "--profile", "2"]) == 0
    table = capsys.readouterr().out.partition("median of 2")[2]
    for step in ("linear", "attention", "qk_norm_rope", "outside of plans"):
        assert step in table
