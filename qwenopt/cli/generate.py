"""`qwenopt generate`: one reply of a compiled model, streamed to standard output."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from qwenopt.cli import arguments, checkpoint, console, stream
from qwenopt.errors import QwenoptError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    arguments.add_model(parser)
    parser.add_argument("--prompt", required=True, type=arguments.text, help="what to ask; - reads standard input")
    parser.add_argument("--no-thinking", action="store_true", help="answer at once, with an empty think block")
    parser.add_argument(
        "--thinking-budget", type=arguments.not_negative, metavar="N", help="think for at most N tokens, then answer"
    )
    parser.add_argument("--max-new-tokens", type=arguments.positive, default=256, metavar="N")
    arguments.add_dtype(parser)
    parser.add_argument("--eager", action="store_true", help="do not compile, to compare")
    arguments.add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """The reply goes to standard output, everything else to standard error."""
    import qwenopt

    folder = checkpoint.locate(args.model)
    checkpoint.check(folder)
    tokenizer = checkpoint.load_tokenizer(folder)
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not text.strip():
        raise QwenoptError("the prompt on standard input is empty; needed: some text")
    prompt = stream.prompt_ids(tokenizer, text, not args.no_thinking)
    model = checkpoint.load(folder, args.dtype)
    room = model.config.max_position_embeddings
    if len(prompt) + args.max_new_tokens > room:
        raise QwenoptError(
            f"{len(prompt) + args.max_new_tokens} tokens, prompt and reply together; the model takes {room}"
        )
    out = stream.TextStream(tokenizer, _show)
    reply, last = stream.Reply(), time.perf_counter()

    def on_token(_: int, token: int) -> None:
        nonlocal last
        waiting.stop()
        reply.tokens.append(token)
        reply.seconds.append(time.perf_counter() - last)
        out.put(token)
        last = time.perf_counter()  # showing it is not the model's time

    waiting = console.Waiting("compiling" if not args.eager else "reading the prompt")
    with waiting, _compiled(not args.eager):
        thinking = None if args.thinking_budget is None else qwenopt.ThinkingConfig(budget=args.thinking_budget)
        done = qwenopt.generate(
            model,
            [prompt],
            max_new_tokens=args.max_new_tokens,
            thinking=thinking,
            tokenizer=tokenizer,
            streamer=on_token,
            temperature=0,
        )
    out.end()
    print(flush=True)
    print(_summary(reply, stream.stop_ids(model), done.thinking), file=sys.stderr)
    return 0


@contextlib.contextmanager
def _compiled(yes: bool) -> Iterator[None]:
    import torch

    if not yes:
        torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


def _summary(reply: stream.Reply, stop_ids: Collection[int], thinking: Sequence[Any] | None) -> str:
    ended = "" if reply.tokens[-1] in stop_ids else ", cut off by --max-new-tokens"
    thought = f", {thinking[0].tokens} of them thought ({thinking[0].reason})" if thinking else ""
    return (
        f"[{len(reply.tokens)} tokens{thought}{ended}; the first two after {sum(reply.seconds[:2]):.1f} s, "
        f"compiling included, then {reply.tokens_per_second:.1f} tokens/s]"
    )


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
