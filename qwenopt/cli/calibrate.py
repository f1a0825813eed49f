"""`qwenopt calibrate`: what a thinking budget and each exit rule cost a model in accuracy and save it in tokens."""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenopt.cli import arguments, calibration, checkpoint, console, curves, curves_plot, machine, questions
from qwenopt.errors import QwenoptError

if TYPE_CHECKING:
    from qwenopt.cli.curves import Point

DEMO_QUESTIONS, PROBE_QUESTIONS = 200, 200
DEMO_NEW_TOKENS, NEW_TOKENS = 512, 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    arguments.add_model(parser)
    parser.add_argument(
        "--questions", type=Path, metavar="FILE", help='JSON lines {"question": ..., "answer": ...} (demo models: own)'
    )
    parser.add_argument("--answer-pattern", metavar="REGEX", help="finds the answer in a reply to a question of a file")
    number: dict[str, Any] = {"type": arguments.positive, "metavar": "N"}
    parser.add_argument("--num-questions", **number, help="measure on so many (default: all; demo models: 200)")
    parser.add_argument("--probe-questions", **number, help="others, to fit the probe to (default: half; demo: 200)")
    parser.add_argument("--rules", nargs="*", choices=curves.RULES, default=list(curves.RULES), help="default: all")
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=arguments.not_negative,
        metavar="N",
        help="default: 12, up to what is mostly thought",
    )
    for rule in curves.RULES:
        parser.add_argument(f"--{rule}", nargs="+", type=float, metavar="T", help=f"thresholds of the {rule} rule")
    parser.add_argument(
        "--boundary", choices=("any", "sentence", "newline", "paragraph"), default="sentence", help="of all rules"
    )
    parser.add_argument("--alpha", type=float, default=0.25, help="weight of the entropy rule's averages")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: greedy (default: the generation config's)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, of the split of a file, and of the probe")
    parser.add_argument("--max-new-tokens", **number, help="of a reply (default: 4096; demo models: 512)")
    parser.add_argument("--batch", type=arguments.positive, default=32, metavar="N", help="replies at a time")
    arguments.add_dtype(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("calibration"), metavar="PREFIX",
        help="write PREFIX.csv, .json, .png and .probe.safetensors (default: calibration)",
    )  # fmt: skip
    parser.add_argument("--no-plot", action="store_true", help="leave out the PNG, which needs matplotlib")
    arguments.add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write. Returns 1 where a budget was exceeded by more than a character's tokens."""
    paths = {kind: Path(f"{args.out}.{kind}") for kind in ("csv", "json", "png", "probe.safetensors")}
    for path in paths.values():
        console.check_writable(path)
    no_plot = None if args.no_plot else curves_plot.missing()
    if no_plot is not None:
        print(f"qwenopt calibrate: {no_plot}. CSV and JSON are written all the same", file=sys.stderr)
    folder = checkpoint.locate(args.model)
    checkpoint.check(folder)
    measured, fitted = _questions(args)
    _check_thresholds(args)
    tokenizer = checkpoint.load_tokenizer(folder)
    bench = calibration.Bench(
        checkpoint.load(folder, args.dtype), tokenizer, measured, fitted,
        max_new_tokens=args.max_new_tokens or (NEW_TOKENS if args.questions else DEMO_NEW_TOKENS),
        batch=args.batch, temperature=args.temperature, seed=args.seed,
    )  # fmt: skip
    start = time.perf_counter()
    told = _fit(bench, args) if "probe" in args.rules else None
    points = _points(bench, args, [r for r in args.rules if r != "probe" or bench.probe is not None])
    best = _best(points)
    result = {
        "command": "calibrate",
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if _plain(k)},
        "machine": machine.facts(args.threads),
        "seconds": round(time.perf_counter() - start, 1),
        "probe": told,
        "best": best,
        "points": [point.to_dict() for point in points],
    }
    paths["csv"].write_text(curves.to_csv(points), encoding="utf-8")
    console.write_json(paths["json"], result)
    if bench.probe is not None:
        bench.probe.save(paths["probe.safetensors"])
    if not args.no_plot and no_plot is None:
        curves_plot.draw(paths["png"], f"{folder.name}, {len(measured)} questions", points)
    _print(points, best)
    return 0 if all((point.most_over_budget or 0) <= calibration.SLACK for point in points) else 1


def _plain(name: str) -> bool:
    return name not in ("run", "needs_torch", "command")


def _questions(args: argparse.Namespace) -> tuple[list[questions.Question], list[questions.Question]]:
    """Those to measure on, and others to fit the probe to: none where no probe is asked for."""
    from qwenopt.demo import DEMO_NAMES

    wants_probe = "probe" in args.rules
    if args.questions is None:
        if args.model not in DEMO_NAMES:
            raise QwenoptError(f"--questions is needed for {args.model}; {questions.NEEDED}. Only demo models have own")
        fitted = questions.demo_questions(args.probe_questions or PROBE_QUESTIONS, "train") if wants_probe else []
        return questions.demo_questions(args.num_questions or DEMO_QUESTIONS, "test"), fitted
    found = questions.read_questions(args.questions, args.answer_pattern)
    random.Random(args.seed).shuffle(found)
    count = (args.probe_questions or len(found) // 2) if wants_probe else 0
    if count >= len(found):
        raise QwenoptError(
            f"--probe-questions {count} of the {len(found)} in {args.questions} leave none to measure on; give fewer"
        )
    return found[count:][: args.num_questions], found[:count]


def _check_thresholds(args: argparse.Namespace) -> None:
    """Raise, before any work is done, for a threshold that its rule does not take."""
    for rule in args.rules:
        for threshold in getattr(args, rule) or curves.THRESHOLDS[rule]:
            if rule == "loop" and threshold != int(threshold):
                raise QwenoptError(f"--loop {threshold}; needed: whole numbers, how often a loop must be seen")
            try:
                curves.setting(rule, threshold, args.boundary, args.alpha)
            except ValueError as error:
                raise QwenoptError(f"--{rule} {threshold}: {error}") from error


def _fit(bench: calibration.Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Fit the bench's probe; without enough to fit it to, say so and go on without that rule."""
    try:
        with console.Waiting(f"fitting a probe to {len(bench.fitted)} questions"):
            fit = dataclasses.asdict(bench.fit_probe(args.boundary))
    except QwenoptError as error:
        print(f"no probe rule: {error}", file=sys.stderr, flush=True)
        return {"error": str(error)}
    print(
        f"probe: {fit['examples']} boundaries of {fit['questions']} questions, {fit['right']:.0%} right; held out: AUC "
        f"{fit['auc']:.3f}, accuracy {fit['accuracy']:.3f}",
        flush=True,
    )
    return fit


def _points(bench: calibration.Bench, args: argparse.Namespace, rules: list[str]) -> list[Point]:
    """Unlimited thinking first; all others are compared with it."""
    unlimited = bench.measure(curves.setting("unlimited", None))
    unlimited.compare(unlimited)
    settings = [curves.setting("budget", n) for n in args.budgets or curves.budgets_for(unlimited.thought)]
    for rule in rules:
        thresholds = getattr(args, rule) or curves.THRESHOLDS[rule]
        settings += [curves.setting(rule, t, args.boundary, args.alpha) for t in thresholds]
    progress = console.Progress("measuring", len(settings), "settings")
    points = [unlimited]
    for number, one in enumerate(settings, 1):
        points.append(bench.measure(one))
        points[-1].compare(unlimited)
        progress.update(number)
    return points


def _best(points: list[Point]) -> dict[str, Any]:
    names = dict.fromkeys(point.rule for point in points[1:])
    return {rule: curves.choose([p for p in points if p.rule == rule], points[0]) for rule in names}


def _print(points: list[Point], best: dict[str, Any]) -> None:
    header = ["rule", "threshold", "right", "lost", "won", "thinking tokens", "saved", "over budget", "cut off"]
    rows = [
        [
            p.rule,
            "-" if p.threshold is None else f"{p.threshold:g}",
            f"{p.accuracy:.1%}",
            str(p.lost),
            str(p.won),
            f"{p.thinking_tokens:.1f}",
            f"{p.saved:.0%}",
            "-" if p.most_over_budget is None else str(p.most_over_budget),
            str(p.cut_off),
        ]
        for p in points
    ]
    print(console.table(header, rows))
    print(f"\nleast thinking at no more than {curves.TOLERANCE:.0%} less accuracy, chosen on every other question and")
    print("measured on the rest:")
    for rule, entry in best.items():
        if entry is None:
            print(f"  {rule}: no setting")
            continue
        print(
            f"  {rule} {entry['threshold']:g}: {entry['accuracy']:.1%} right, unlimited "
            f"{entry['unlimited_accuracy']:.1%}; {entry['thinking_tokens']:.1f} thinking tokens, "
            f"{entry['saved']:.0%} fewer"
        )
