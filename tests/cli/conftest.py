"""A tiny Qwen3 checkpoint with the demo models' tokenizer, and a way to break copies of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwenopt.demo.load import demo_path
from qwenopt.testing.models import tiny_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense model of two layers; read only."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model = tiny_model("0.6B", torch.bfloat16, vocab_size=512)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_path("dense") / name, folder / name)
    return folder


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Callable[[Callable[[Path], object]], Path]:
    """Make a copy of the checkpoint that a function has changed."""

    def make(change: Callable[[Path], object]) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(checkpoint, folder)
        change(folder)
        return folder

    return make
