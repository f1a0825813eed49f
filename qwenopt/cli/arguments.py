"""Types of command line arguments, with errors that say what is needed."""

from __future__ import annotations

import argparse

DTYPES = ("float32", "bfloat16", "float16")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; needed: a whole number of at least 1")
    return value


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r}; needed: a whole number of at least 0")
    return value


def text(value: str) -> str:
    """Text that is not empty."""
    if not value.strip():
        raise argparse.ArgumentTypeError("empty; needed: some text")
    return value


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Declare `--threads`."""
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's choice)")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Declare `--dtype`."""
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="default: as stored")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare `--model`."""
    parser.add_argument(
        "--model", default="dense", metavar="PATH", help="a Qwen3 checkpoint folder, or dense or moe (default: dense)"
    )
