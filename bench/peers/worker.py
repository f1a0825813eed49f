"""The process of one peer: loads the model once, then answers requests, one line of JSON each, until its input ends.

`python -m bench.peers.worker NAME MODEL THREADS`. While it waits for a request it sleeps.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

from bench.peers import registry
from bench.peers.peer import Engine, to_json


def answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request asks for: `{"kind": "prefill" or "decode", "prompts": [[...], ...], "steps": 16}`."""
    if request["kind"] == "prefill":
        (prompt,) = request["prompts"]
        return to_json(engine.prefill(prompt))
    return to_json(engine.decode(request["prompts"], request["steps"]))


def serve(engine: Engine, requests: TextIO, replies: TextIO) -> None:
    """Answer every line of `requests` by a line of `replies`."""
    for line in requests:
        _send(replies, answer(engine, json.loads(line)))


def main(name: str, model: str, threads: str) -> int:
    """Returns 1 where the peer cannot load the model or fails at a request; the reason is sent as the last line."""
    replies = _private_stdout()
    try:
        peer = registry.PEERS[name]
        engine = peer.load(Path(model), int(threads))
        _send(replies, {"versions": peer.versions()})
        serve(engine, sys.stdin, replies)
    except BaseException as error:
        traceback.print_exc()
        _send(replies, {"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _private_stdout() -> TextIO:
    """The original standard output; what libraries print goes to standard error from here on."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def _send(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
