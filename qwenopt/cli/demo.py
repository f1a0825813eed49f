"""`qwenopt demo`: the shipped models, or one of the user's, compiled, questioned, checked against eager and timed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwenopt.cli import arguments, checkpoint, console, machine, measure, speed, stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qwenopt.demo.task import Question

MAX_NEW_TOKENS = 400  # the longest thinking trace of the shipped models has 355 tokens
SPEED_STEPS = 32
OWN_PROMPT = "Explain in two sentences why the sky is blue."
OWN_NEW_TOKENS = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--size", choices=("0.6b", "30b-a3b-4l"), help="a full-size model with random weights instead")
    what.add_argument("--model", metavar="PATH", help="a Qwen3 checkpoint folder, or one shipped model: dense or moe")
    parser.add_argument("--vs", choices=("inductor",), help="with --size: measure this backend, too")
    parser.add_argument("--no-cold", action="store_true", help="with --size: leave the cold starts out")
    parser.add_argument(
        "--prompt", type=arguments.text, help="with --model: what to ask (of a shipped model: one of its own questions)"
    )
    parser.add_argument("--questions", type=arguments.positive, default=1, help="how many, of shipped models")
    parser.add_argument("--max-new-tokens", type=arguments.positive, help="longest reply")
    parser.add_argument("--rounds", type=arguments.positive, default=5, help="alternating rounds when timing")
    parser.add_argument(
        "--dtype",
        choices=arguments.DTYPES,
        default="float32",
        help="with --model: in 16 bits, tokens may differ from eager's without anything being wrong",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to this file")
    arguments.add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 1 where tokens differ from eager's in float32."""
    _check_combination(args)
    console.check_writable(args.json)
    if args.size:
        from qwenopt.cli import demo_size

        return demo_size.run(args)
    import torch

    names = [args.model] if args.model else ["dense", "moe"]
    folders = {name: checkpoint.locate(name) for name in names}
    for folder in folders.values():
        checkpoint.check(folder)
    models = [_one_model(name, folder, args) for name, folder in folders.items()]
    result: dict[str, Any] = {"command": "demo", "machine": machine.facts(torch.get_num_threads()), "models": models}
    result["equal"] = all(reply["equal"] for model in models for reply in model["replies"])
    _print_summary(models)
    if args.json is not None:
        console.write_json(args.json, result)
    if result["equal"]:
        return 0
    print("\nTokens differ from eager's.", "" if args.dtype == "float32" else f"In {args.dtype} that is no error.")
    return 1 if args.dtype == "float32" else 0


def _check_combination(args: argparse.Namespace) -> None:
    from qwenopt.errors import QwenoptError

    if (args.vs or args.no_cold) and not args.size:
        raise QwenoptError("--vs and --no-cold go with --size, which was not given")
    if args.prompt and not args.model:
        raise QwenoptError("--prompt goes with --model, which was not given")


def _one_model(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    import qwenopt

    model, tokenizer = checkpoint.load(folder, args.dtype), checkpoint.load_tokenizer(folder)
    print(
        f"\n=== {name}: {type(model).__name__}, {checkpoint.parameters(model):,} parameters, "
        f"{model.config.num_hidden_layers} layers, {args.dtype}, from {folder}",
        flush=True,
    )
    new = speed.NewGraphs()
    qwenopt.compile(model)
    asked = _questions(name, args)
    limit = args.max_new_tokens or (OWN_NEW_TOKENS if asked[0].known is None else MAX_NEW_TOKENS)
    session = Session(model, tokenizer, asked, limit)
    replies = [session.ask(one) for one in asked]
    compile_seconds = session.compile_seconds()
    report = new.report()
    for graph in report.graphs:
        print(f"rewritten: {graph.line()}")
    print(f"compiling took {compile_seconds:.1f} s", flush=True)
    return {
        "name": name,
        "folder": str(folder),
        "architecture": type(model).__name__,
        "parameters": checkpoint.parameters(model),
        "dtype": args.dtype,
        "replies": replies,
        "report": report.to_dict(),
        "compile_seconds": compile_seconds,
        "decode": session.decode_speed(args.rounds),
    }


class Asked(NamedTuple):
    """One thing to ask: the text, whether to think, and the question with its answer if the shipped models know it."""

    text: str
    thinking: bool
    known: Question | None = None


def _questions(name: str, args: argparse.Namespace) -> list[Asked]:
    """Everything in both modes: questions of the shipped models' own task, or one prompt."""
    from qwenopt.demo import DEMO_NAMES, task

    if name in DEMO_NAMES and not args.prompt:
        drawn = task.unseen_questions(args.questions)
        return [Asked(q.text, thinking, q) for q in drawn for thinking in (True, False)]
    text = args.prompt or OWN_PROMPT
    return [Asked(text, True), Asked(text, False)]


class Session:
    """One compiled model that is asked questions: every reply is streamed, then generated by eager and compared."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[Asked], max_new_tokens: int
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.limit = max_new_tokens
        self.stop = stream.stop_ids(model)
        self.replies: list[stream.Reply] = []
        self.prompts = {one: stream.prompt_ids(tokenizer, one.text, one.thinking) for one in asked}
        self.speed_prompt = stream.prompt_ids(tokenizer, OWN_PROMPT, thinking=False)
        # Caches of one size for everything, so that no question needs graphs of its own.
        room = max(map(len, [*self.prompts.values(), self.speed_prompt])) + max(max_new_tokens, SPEED_STEPS)
        self.compiled_cache = stream.static_cache(model, room)
        self.eager_cache = stream.static_cache(model, room)

    def ask(self, asked: Asked) -> dict[str, Any]:
        """Stream the reply to one question, compare it with eager's and return what is to be recorded."""
        from qwenopt.demo import task

        prompt, limit = self.prompts[asked], self.limit
        print(f"\n[{'thinking' if asked.thinking else 'no thinking'}] {asked.text}", flush=True)
        shown: list[str] = []

        def write(part: str) -> None:
            shown.append(part)
            sys.stdout.write(part)
            sys.stdout.flush()

        out = stream.TextStream(self.tokenizer, write)
        waiting = console.Waiting("compiling")

        def on_token(token: int) -> None:
            waiting.stop()
            out.put(token)

        with waiting:
            reply = stream.greedy(self.model, self.compiled_cache, prompt, limit, self.stop, on_token)
        out.end()
        expected = stream.greedy(self.model.forward, self.eager_cache, prompt, limit, self.stop)
        self.replies.append(reply)
        answer = "".join(shown)
        differs = first_difference(reply.tokens, expected.tokens)
        print(f"\n--> {len(reply.tokens)} tokens, {_verdict(differs)}", end="")
        correct = None if asked.known is None else task.is_correct(asked.known, answer)
        print("" if correct is None else f"; the answer is {'right' if correct else 'wrong'}", flush=True)
        return {
            "prompt": asked.text,
            "thinking": asked.thinking,
            "text": answer,
            "tokens": reply.tokens,
            "eager_tokens": expected.tokens,
            "equal": differs is None,
            "first_difference": differs,
            "correct": correct,
            "first_token_seconds": reply.seconds[0],
            "tokens_per_second": reply.tokens_per_second,
        }

    def compile_seconds(self) -> float:
        """What the first three tokens of the replies took beyond what they take once everything is compiled."""
        steady = [s for reply in self.replies for s in reply.seconds[3:]] or [0.0]
        usual = measure.spread(steady).median
        first = min(reply.seconds[0] for reply in self.replies)
        first = usual if len(self.replies) == 1 else first
        extra = 0.0
        for reply in self.replies:
            expected = first + usual * len(reply.seconds[1:3])
            extra += max(0.0, sum(reply.seconds[:3]) - expected)
        return extra

    def decode_speed(self, rounds: int) -> dict[str, Any]:
        """Decode tokens/s of eager and compiled, by the same loop in alternating rounds."""
        prompt = self.speed_prompt

        def eager() -> float:
            return stream.greedy(self.model.forward, self.eager_cache, prompt, SPEED_STEPS).tokens_per_second

        def compiled() -> float:
            return stream.greedy(self.model, self.compiled_cache, prompt, SPEED_STEPS).tokens_per_second

        compiled()
        samples = measure.alternate({"eager": eager, "qwenopt": compiled}, rounds)
        speeds = {name: measure.spread(values) for name, values in samples.items()}
        figures: dict[str, Any] = {name: value.to_dict() for name, value in speeds.items()}
        return figures | {"ratio_to_eager": speeds["qwenopt"].median / speeds["eager"].median}


def first_difference(tokens: list[int], expected: list[int]) -> int | None:
    """Index of the first token that differs, or None where both are the same."""
    if tokens == expected:
        return None
    return next(
        (i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), min(len(tokens), len(expected))
    )


def _verdict(differs: int | None) -> str:
    return "the same as eager's" if differs is None else f"DIFFERENT from eager's from token {differs} on"


def _print_summary(models: list[dict[str, Any]]) -> None:
    rows = []
    for model in models:
        replies, decode = model["replies"], model["decode"]
        counts = model["report"]["graphs"][0]["counts"] if model["report"]["graphs"] else {}
        rows.append(
            [
                model["name"],
                f"{sum(reply['equal'] for reply in replies)} of {len(replies)}",
                str(sum(len(reply["tokens"]) for reply in replies)),
                str(sum(counts.values())),
                f"{model['compile_seconds']:.1f} s",
                f"{decode['eager']['median']:.1f}",
                f"{decode['qwenopt']['median']:.1f}",
                f"{decode['ratio_to_eager']:.2f}x",
            ]
        )
    header = ["model", "replies as eager", "tokens", "sites", "compile", "eager tok/s", "qwenopt tok/s", "ratio"]
    print(f"\n{console.table(header, rows)}")
