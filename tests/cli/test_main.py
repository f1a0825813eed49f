"""The command itself: help, version, exit statuses, and that nothing heavy is loaded before it is needed."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from qwenopt import __version__, cli
from qwenopt.errors import QwenoptError


def test_importing_the_command_loads_no_torch() -> None:
    code = "import sys, qwenopt.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"qwenopt {__version__}\n"


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert all(command.name in capsys.readouterr().out for command in cli.COMMANDS[:1])


@pytest.mark.parametrize("command", [command.name for command in cli.COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: qwenopt" in capsys.readouterr().out


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def run(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("doctor", "fails", lambda parser: None, run, False),))
    return cli.main(["doctor"])


def test_interrupt_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail_with(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_our_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_with(QwenoptError("what is wrong; what to do"), monkeypatch) == 2
    assert capsys.readouterr().err == "qwenopt doctor: what is wrong; what to do\n"


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_with(ZeroDivisionError(), monkeypatch)


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m qwenopt.cli doctor | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141)
    assert "Traceback" not in done.stderr


def test_missing_torch_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["explain"]) == 2
    assert "add it by: pip install torch transformers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nope"], "invalid choice: 'nope'"),
        (["generate"], "required: --prompt"),
        (["generate", "--prompt", " "], "empty; needed: some text"),
        (["generate", "--prompt", "x", "--max-new-tokens", "0"], "'0'; needed: a whole number of at least 1"),
        (["demo", "--threads", "two"], "'two'; needed: a whole number of at least 1"),
        (["demo", "--size", "7b"], "invalid choice: '7b'"),
        (["demo", "--size", "0.6b", "--model", "dense"], "not allowed with argument"),
    ],
)
def test_bad_arguments(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert text in capsys.readouterr().err
