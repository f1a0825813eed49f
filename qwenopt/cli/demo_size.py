"""`qwenopt demo --size`: decode, prefill and cold start of a full-size model with random weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenopt.cli import checkpoint, cold, console, machine, measure, speed
from qwenopt.testing import fullsize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPE = "bfloat16"


def run(args: argparse.Namespace) -> int:
    """Build or find the model, measure, print. Returns 1 where some backend's logits are not eager's."""
    import torch

    folder = _model_folder(args.size)
    names = ("eager", "qwenopt", "inductor") if args.vs else ("eager", "qwenopt")
    threads = torch.get_num_threads()
    starts = {} if args.no_cold else _cold_starts(folder, names, threads)
    print(f"loading {folder}", flush=True)
    model = checkpoint.load(folder, DTYPE)
    result: dict[str, Any] = {
        "command": "demo",
        "size": args.size,
        "machine": machine.facts(threads),
        "model": {
            "folder": str(folder),
            "parameters": checkpoint.parameters(model),
            "dtype": DTYPE,
            "bytes_per_token": speed.bytes_per_token(model),
            "prefill_flops": speed.prefill_flops(model, speed.PREFILL_TOKENS),
            "experts_implementation": getattr(model.config, "_experts_implementation", None),
        },
        "cold": starts,
    }
    result |= _measure(model, names, args.rounds)
    _print(result)
    if args.json is not None:
        console.write_json(args.json, result)
    return 0 if all(error <= speed.MAX_LOGIT_ERROR for error in result["logit_error"].values()) else 1


def _model_folder(name: str) -> Path:
    folder = fullsize.folder_of(name)
    if not folder.is_dir():
        total = fullsize.total_bytes(fullsize.SIZES[name].config())
        print(f"building random weights for {name} in {folder} ({total / 1e9:.1f} GB, once)", flush=True)
        bar = console.Progress("writing", total / 1e9, "GB")
        fullsize.ensure(name, lambda done: bar.update(done / 1e9))
    return folder


def _cold_starts(folder: Path, names: tuple[str, ...], threads: int) -> dict[str, Any]:
    """Cold runs come first, while this process does not hold the model as well."""
    results = {}
    for name in names:
        hint = ", some minutes" if name == "inductor" else ""
        with console.Waiting(f"cold start with {name} (own process, empty caches{hint})"):
            results[name] = cold.measure(folder, name, DTYPE, threads)
        first, second = results[name]["first_token_seconds"], results[name]["second_token_seconds"]
        print(f"cold start, {name}: first token after {first:.1f} s, second after {second:.1f} s", flush=True)
    return results


def _measure(model: PreTrainedModel, names: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Warm up, compare logits, then time decode and prefill in alternating rounds."""
    new = speed.NewGraphs()
    calls = speed.calls(model, names)
    work = {kind: {n: speed.Workload(kind, model, call) for n, call in calls.items()} for kind in ("decode", "prefill")}
    errors, compile_seconds = _warm_up(work)
    ceilings = measure.Ceilings()
    reads: list[float] = []
    speeds: dict[str, dict[str, Any]] = {}
    for kind, contenders in work.items():
        runs = {name: contender.tokens_per_second for name, contender in contenders.items()}
        with console.Waiting(f"{kind}: {rounds} rounds of {', '.join(names)}"):
            samples = measure.alternate(runs, rounds, lambda: reads.append(ceilings.read_gbps()))
        speeds[kind] = {name: measure.spread(values) for name, values in samples.items()}
    limits = {
        "read_gbps": measure.spread(reads).to_dict(),
        "bf16_gflops": ceilings.bf16_gflops(),
        "source": ceilings.source,
    }
    return {
        "report": new.report().to_dict(),
        "compile_seconds": compile_seconds,
        "logit_error": errors,
        "ceilings": limits,
        **_figures(model, speeds, limits),
    }


def _warm_up(work: dict[str, dict[str, speed.Workload]]) -> tuple[dict[str, float], dict[str, float]]:
    """Compile everything; returns the largest logit error and the seconds of all first calls by backend."""
    errors: dict[str, float] = {}
    spent: dict[str, float] = {}
    for kind, contenders in work.items():
        expected = None
        for name, contender in contenders.items():
            with console.Waiting(f"{kind}: first call with {name}"):
                logits, seconds = contender.first()
            expected = logits if expected is None else expected
            spent[name] = spent.get(name, 0.0) + seconds
            errors[name] = max(errors.get(name, 0.0), speed.logit_error(logits, expected))
            contender.tokens_per_second()
    return errors, spent


def _figures(
    model: PreTrainedModel, speeds: dict[str, dict[str, measure.Spread]], limits: dict[str, Any]
) -> dict[str, Any]:
    """Speeds with their ratios to eager and their shares of what the machine allows."""
    read_bytes = speed.bytes_per_token(model)
    flops = speed.prefill_flops(model, speed.PREFILL_TOKENS) / speed.PREFILL_TOKENS
    figures: dict[str, Any] = {}
    for kind, by_name in speeds.items():
        figures[kind] = {}
        for name, value in by_name.items():
            entry = {"tokens_per_second": value.to_dict(), "ratio_to_eager": value.median / by_name["eager"].median}
            if kind == "decode":
                entry["share_of_read_bandwidth"] = value.median * read_bytes / 1e9 / limits["read_gbps"]["median"]
            else:
                entry["share_of_bf16_peak"] = value.median * flops / 1e9 / limits["bf16_gflops"]
            figures[kind][name] = entry
    return figures


def _print(result: dict[str, Any]) -> None:
    for graph in result["report"]["graphs"]:
        counts = ", ".join(f"{op} {n}" for op, n in graph["counts"].items()) or "nothing"
        print(f"graph {graph['index']}: rewritten {counts}; lowering {graph['lowering']} {graph['reason']}".rstrip())
    rows = []
    for name in result["decode"]:
        decode, prefill = result["decode"][name], result["prefill"][name]
        start = result["cold"].get(name)
        rows.append(
            [
                name,
                _speed(decode),
                f"{decode['share_of_read_bandwidth']:.0%}",
                _speed(prefill),
                f"{prefill['share_of_bf16_peak']:.0%}",
                f"{start['first_token_seconds']:.1f} s" if start else "-",
                f"{start['peak_memory_bytes'] / 1e9:.1f} GB" if start else "-",
                f"{result['logit_error'][name]:.1e}",
            ]
        )
    header = ["", "decode tok/s", "of BW", "prefill tok/s", "of peak", "cold first token", "peak memory", "logit error"]
    read, threads = result["ceilings"]["read_gbps"], result["machine"]["threads"]
    print(f"\n{result['size']}, random weights, {DTYPE}, {threads} threads; medians (smallest - largest), x: eager")
    print(console.table(header, rows))
    print(
        f"BW: read {read['median']:.1f} GB/s ({read['low']:.1f} - {read['high']:.1f}); "
        f"peak: bf16 {result['ceilings']['bf16_gflops']:.0f} GFLOP/s; measured by {result['ceilings']['source']} code"
    )


def _speed(entry: dict[str, Any]) -> str:
    value = entry["tokens_per_second"]
    return f"{value['median']:.1f} ({value['low']:.1f} - {value['high']:.1f}) {entry['ratio_to_eager']:.2f}x"
