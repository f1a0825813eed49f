"""qwenopt calibrate: questions and answers, curves, and the command on a demo model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwenopt import cli
from qwenopt.cli import curves, curves_plot, questions
from qwenopt.errors import QwenoptError


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<think>\nThe answer is 3.\n</think>\n\nThe answer is 5.", "5"),
        ("The answer is **12**.", "12"),
        ("so \\boxed{7} and not 8", "7"),
        ("First 3, then 1,200", "1,200"),
        ("Paris", "Paris"),
        ("<think>\nThe answer is 3.", None),
        ("<think>\n</think>\n\n", None),
    ],
)
def test_the_answer_of_a_reply(reply: str, answer: str | None) -> None:
    found = questions.answer_of(reply)
    assert (found and found.strip(".*")) == answer


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("5.", "5", True),
        ("1,200", "1200.0", True),
        ("1/2", "0.5", True),
        ("$7", "7", True),
        ("paris.", " Paris", True),
        ("12", "1", False),
        ("Paris", "Rome", False),
        ("1/0", "0", False),
    ],
)
def test_answers_are_compared_by_what_they_mean(a: str, b: str, equal: bool) -> None:
    assert questions.same(a, b) is equal


def test_questions_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "2 + 3?", "answer": 5}\n\n{"question": "x?", "answer": "because #### 1,000"}\n')
    first, second = questions.read_questions(path)
    assert first.text == "2 + 3?"
    assert first.is_right("It is 5")
    assert not first.is_right("<think> 5")
    assert second.is_right("1000")
    (only, _) = questions.read_questions(path, r"= (\d+)")
    assert only.is_right("4 = 5, as 3")
    assert not only.is_right("5")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "holds no questions; needed: JSON lines such as"),
        ("{", "line 1 is no JSON"),
        ("[1]", 'line 1 has no text under "question"'),
        (
            '{"question": "a", "answer": "b"}\n{"question": "a", "answer": null}',
            'line 2 has no text or number under "a',
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(content)
    with pytest.raises(QwenoptError, match=text):
        questions.read_questions(path)


def test_demo_questions_of_the_two_splits_differ() -> None:
    test, train = (questions.demo_questions(20, split) for split in ("test", "train"))
    assert len({q.text for q in (*test, *train)}) == 40
    assert sum(test[0].is_right(f"The answer is {digit}.") for digit in range(10)) == 1


def point(rule: str, threshold: float | None, right: list[bool], thought: list[int]) -> curves.Point:
    return curves.Point(rule, threshold, right, thought, [0] * len(right), thought, {}, 0, 1.0)


def test_the_choice_is_measured_on_the_other_half() -> None:
    """The cheap setting is right on the questions that it is chosen by, and wrong on the others: that is shown."""
    unlimited = point("unlimited", None, [True] * 8, [100] * 8)
    cheap = point("margin", 2.0, [True, False] * 4, [10, 30] * 4)
    dear = point("margin", 1.0, [True] * 8, [60] * 8)
    poor = point("margin", 3.0, [False] * 8, [1] * 8)
    best = curves.choose([cheap, dear, poor], unlimited)
    assert best is not None
    assert (best["threshold"], best["accuracy"], best["thinking_tokens"]) == (2.0, 0.0, 30.0)
    assert best["saved"] == pytest.approx(0.7)
    assert curves.choose([poor], unlimited) is None
    cheap.compare(unlimited)
    assert (cheap.lost, cheap.won, cheap.saved) == (4, 0, pytest.approx(0.8))


def test_default_budgets_cover_what_is_thought() -> None:
    budgets = curves.budgets_for([*range(1, 100), 5000])
    assert len(budgets) == 12
    assert budgets[0] == 0
    assert budgets[-1] == 90
    assert budgets == sorted(set(budgets))
    assert len(curves.budgets_for([0, 0, 1])) >= 8  # even of a model that hardly thinks


def test_a_budget_that_does_not_hold_is_told() -> None:
    stats = [SimpleNamespace(tokens=n, forced_tokens=3, reason="budget") for n in (8, 10)]
    out = SimpleNamespace(replies=[[1, 2], [1]], thinking=stats)
    found = curves.measure(curves.setting("budget", 8), lambda config: out, lambda i, ids: i == 0, frozenset({2}))
    assert (found.most_over_budget, found.cut_off, found.accuracy, found.reasons) == (2, 1, 0.5, {"budget": 2})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--loop", "1.5"], "--loop 1.5; needed: whole numbers"),
        (["--loop", "1"], "--loop 1.0: LoopRule: times 1; it must be 2..64"),
        (["--margin", "nan"], "--margin nan: MarginRule: tau nan; it must be a finite number"),
        (["--alpha", "0"], "alpha 0.0; it must be more than 0"),
        (["--questions", "none.jsonl"], "none.jsonl cannot be read"),
        (["--out", "no/such/folder/x"], "the folder no/such/folder does not exist"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    arguments: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["calibrate", *arguments]) == 2
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_model_without_questions_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", "--model", str(checkpoint), "--no-plot"]) == 2
    assert "--questions is needed for" in capsys.readouterr().err


SHORT = ["--dtype", "float32", "--temperature", "0", "--batch", "8", "--budgets", "0", "20", "60", "100"]


@pytest.mark.slow
def test_the_demo_models_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A short one: what is written, and that more thinking is more right answers."""
    out = tmp_path / "dense"
    sizes = ["--num-questions", "24", "--probe-questions", "16", "--probe", "0.5", "0.99", "--no-plot"]
    rules = ["--rules", "loop", "probe", "--loop", "2"]
    assert cli.main(["calibrate", *SHORT, *sizes, *rules, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    data = json.loads(out.with_suffix(".json").read_text())
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert [row["rule"] for row in rows] == ["unlimited", *["budget"] * 4, "loop", *["probe"] * 2]
    assert [p["rule"] for p in data["points"]] == [row["rule"] for row in rows]
    accuracy = [p["accuracy"] for p in data["points"]]
    assert accuracy[0] == 1.0
    assert accuracy[1] <= accuracy[2] <= accuracy[3] <= accuracy[4] == 1.0
    assert all(p["most_over_budget"] == 0 for p in data["points"][1:5])
    assert data["probe"]["auc"] > 0.7
    assert data["machine"]["versions"]["torch"]
    assert data["best"]["loop"]["saved"] > 0.3
    assert "least thinking at no more than 1% less accuracy" in shown
    assert not out.with_suffix(".png").exists()
    assert (tmp_path / "dense.probe.safetensors").exists()


@pytest.mark.slow
def test_own_questions_and_no_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of a file is for the probe; too few for one are said, and the rest goes on. The plot is named as missing."""
    monkeypatch.setattr(curves_plot, "find_spec", lambda name: None)
    path = tmp_path / "q.jsonl"
    demo = questions.demo_questions(6, "test")
    answers = [next(d for d in range(10) if q.is_right(f"answer is {d}.")) for q in demo]
    lines = [json.dumps({"question": q.text, "answer": a}) for q, a in zip(demo, answers, strict=True)]
    path.write_text("\n".join(lines))
    limit = ["--max-new-tokens", "440", "--out", str(tmp_path / "own")]
    ask = ["calibrate", *SHORT, "--rules", "probe", "--questions", str(path), "--probe-questions", "1", *limit]
    assert cli.main(ask) == 0
    captured = capsys.readouterr()
    assert "the plot needs matplotlib" in captured.err
    assert "no probe rule: fit_probe" in captured.err
    data = json.loads((tmp_path / "own.json").read_text())
    assert {p["rule"] for p in data["points"]} == {"unlimited", "budget"}
    assert data["points"][0]["questions"] == 5
    assert data["points"][0]["accuracy"] == 1.0
    assert "needed" in data["probe"]["error"] or "needs" in data["probe"]["error"]
    assert not (tmp_path / "own.png").exists()


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points: list[Any] = [point("unlimited", None, [True, True], [90, 110])]
    points += [point("budget", n, [n > 20, n > 40], [n, n]) for n in (10, 30, 50)]
    curves_plot.draw(tmp_path / "x.png", "a model", points)
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
