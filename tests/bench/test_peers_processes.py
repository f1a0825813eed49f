"""Installing and running peers: stamps, commands that fail, the protocol of the workers, the options."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.peers import __main__ as command
from bench.peers import client, driver, install, peer, registry, results, worker
from bench.peers.peer import Engine, Peer, PeerError, Place, Timing


class FakeEngine:
    """Takes a second for each token that it reads or decodes, and answers with the first token of each prompt."""

    def prefill(self, prompt: list[int]) -> Timing:
        return Timing(float(len(prompt)), prompt[:1])

    def decode(self, prompts: list[list[int]], steps: int) -> Timing:
        return Timing(float(steps), [prompt[0] for prompt in prompts])


class FakePeer(Peer):
    """Installs nothing; how often it was asked to is counted."""

    name = "fake"
    pins = ("fake==1.0",)

    def __init__(self) -> None:
        self.installed = 0

    def install(self, place: Place) -> None:
        self.installed += 1

    def load(self, model: Path, threads: int) -> Engine:
        return FakeEngine()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A peer's folder in which the environment seems to be there."""
    made = Place(tmp_path / "fake")
    made.python.parent.mkdir(parents=True)
    made.python.write_text("")
    return made


def test_installs_once(place: Place) -> None:
    fake = FakePeer()
    install.ensure(fake, place)
    install.ensure(fake, place)
    install.ensure(fake, place, may_install=False)
    assert fake.installed == 1


def test_other_versions_are_installed_anew(place: Place) -> None:
    fake = FakePeer()
    install.ensure(fake, place)
    fake.pins = ("fake==2.0",)
    assert not install.is_installed(fake, place)
    with pytest.raises(PeerError, match="--no-install"):
        install.ensure(fake, place, may_install=False)
    install.ensure(fake, place)
    assert fake.installed == 2


def test_a_failed_installation_leaves_no_stamp_and_says_why(place: Place) -> None:
    class Failing(FakePeer):
        def install(self, place: Place) -> None:
            install.run(place, [sys.executable, "-c", "import sys; print('no such version'); sys.exit(3)"])

    with pytest.raises(PeerError, match=r"(?s)exit status 3.*no such version"):
        install.ensure(Failing(), place)
    assert not install.is_installed(Failing(), place)


def test_peers_without_pins_need_no_environment(tmp_path: Path) -> None:
    install.ensure(registry.PEERS["eager"], Place(tmp_path / "eager"), may_install=False)
    assert not (tmp_path / "eager").exists()


def test_every_pin_names_one_version() -> None:
    for one in registry.PEERS.values():
        assert all(pin.count("==") == 1 for pin in one.pins)


def test_a_worker_answers_line_by_line() -> None:
    requests = [
        {"kind": "prefill", "prompts": [[7, 8, 9]], "steps": 4},
        {"kind": "decode", "prompts": [[5, 6], [3, 4]], "steps": 4},
    ]
    replies = io.StringIO()
    worker.serve(FakeEngine(), io.StringIO("".join(json.dumps(one) + "\n" for one in requests)), replies)
    assert [json.loads(line) for line in replies.getvalue().splitlines()] == [
        {"seconds": 3.0, "first_tokens": [7]},
        {"seconds": 4.0, "first_tokens": [5, 3]},
    ]


def test_a_worker_that_cannot_load_gives_the_reason(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"CheckpointError: .*absent"):
        client.Worker(registry.PEERS["eager"], Place(tmp_path), tmp_path / "absent", threads=1)


def test_a_worker_process_that_dies_gives_its_last_words(tmp_path: Path) -> None:
    class Dying(FakePeer):
        name = "none of the known"

    place = Place(tmp_path)
    place.python.parent.mkdir(parents=True)
    place.python.symlink_to(sys.executable)
    with pytest.raises(PeerError, match="KeyError: 'none of the known'"):
        client.Worker(Dying(), place, tmp_path, threads=1)


def test_a_peer_that_is_not_installed_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(driver.fullsize, "ensure", lambda size: tmp_path)
    settings = driver.Settings("0.6b", ["eager", "vllm"], ["decode"], 1, 1, 1, may_install=False, cold=False)
    starts = {name: results.Start() for name in settings.names}
    assert driver._prepare(settings, starts) == {"eager": tmp_path}
    assert starts["vllm"].error == "not installed, and --no-install was given"
    assert starts["eager"].error is None


def test_reads_the_peak_memory() -> None:
    assert client.peak_bytes("Name:\tpython\nVmPeak:\t  99 kB\nVmHWM:\t    2048 kB\n") == 2 << 20
    assert client.peak_bytes("") == 0


def test_the_tail_of_a_log_skips_empty_lines() -> None:
    assert peer.tail("a\n\nb\n \nc  \n", lines=2) == "b\nc"


def test_names_are_checked() -> None:
    parse = command.names_of(["eager", "vllm"])
    assert parse("vllm,eager,vllm") == ["vllm", "eager"]
    with pytest.raises(argparse.ArgumentTypeError, match="vlm; known: eager, vllm"):
        parse("vlm,eager")


def test_the_defaults_are_a_full_run() -> None:
    args: Any = command.parser().parse_args([])
    assert (args.size, args.rounds, args.steps, args.peers, args.no_install) == ("0.6b", 6, 16, None, False)
