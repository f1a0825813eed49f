"""`qwenopt generate`: one reply of a compiled model, streamed to standard output."""

from __future__ import annotations

import argparse
import sys

from qwenopt.cli import arguments, checkpoint, console, stream
from qwenopt.errors import QwenoptError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    arguments.add_model(parser)
    parser.add_argument("--prompt", required=True, type=arguments.text, help="what to ask; - reads standard input")
    parser.add_argument("--no-thinking", action="store_true", help="answer at once, with an empty think block")
    parser.add_argument("--max-new-tokens", type=arguments.positive, default=256, metavar="N")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: as stored")
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
    cache = stream.static_cache(model, len(prompt) + args.max_new_tokens)
    if not args.eager:
        qwenopt.compile(model)
    out = stream.TextStream(tokenizer, _show)
    call = model.forward if args.eager else model
    waiting = console.Waiting("compiling" if not args.eager else "reading the prompt")

    def on_token(token: int) -> None:
        waiting.stop()
        out.put(token)

    with waiting:
        reply = stream.greedy(call, cache, prompt, args.max_new_tokens, stream.stop_ids(model), on_token)
    out.end()
    print(flush=True)
    ended = "" if reply.tokens[-1] in stream.stop_ids(model) else ", cut off by --max-new-tokens"
    print(
        f"[{len(reply.tokens)} tokens{ended}; the first two after {sum(reply.seconds[:2]):.1f} s, "
        f"compiling included, then {reply.tokens_per_second:.1f} tokens/s]",
        file=sys.stderr,
    )
    return 0


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
