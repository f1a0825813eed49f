"""Checkpoints that are missing, broken or of another kind: one line that says so, exit status 2, no traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qwenopt import cli
from qwenopt.cli import checkpoint as checkpoints
from qwenopt.errors import CheckpointError, QwenoptError

Broken = Callable[[Callable[[Path], object]], Path]


def edit_config(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def scramble_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(data)


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def rename_to_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def rename_to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json; needed: a folder with a Qwen3"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "holds a JSON list; needed: an object"),
    "another model": (edit_config(model_type="llama"), "model_type is 'llama'; needed: qwen3 or qwen3_moe"),
    "no model type": (edit_config(model_type=None), "model_type is None"),
    "another head": (edit_config(architectures=["Qwen3ForSequenceClassification"]), "needed: Qwen3ForCausalLM"),
    "quantised": (edit_config(quantization_config={"quant_method": "fp8"}), "are quantised (fp8)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickled weights": (rename_to_pickle, "it has pytorch_model.bin; convert"),
    "truncated weights": (truncate, "where its header promises"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "was cut short (0 bytes)"),
    "scrambled header": (scramble_header, "has a damaged header"),
    "a shard is missing": (rename_to_shard, "lacks model-00001-of-00002.safetensors"),
    "a weight is missing": (drop_a_tensor, "1 weights are missing or of another shape"),
    "other layers than weights": (edit_config(num_hidden_layers=3), "cannot be loaded as a Qwen3 checkpoint"),
    "another size": (edit_config(hidden_size=128), "broken"),
    "no such activation": (edit_config(hidden_act="nope"), "cannot be loaded as a Qwen3 checkpoint"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_checkpoints_are_explained(name: str, broken: Broken, capsys: pytest.CaptureFixture[str]) -> None:
    change, text = BREAKS[name]
    folder = broken(change)
    assert cli.main(["explain", "--model", str(folder)]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert str(folder) in error
    assert error.count("\n") == 1


def test_missing_folder_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for command in (["demo"], ["generate", "--prompt", "x"], ["plan"]):
        assert cli.main([*command, "--model", str(tmp_path / "nope")]) == 2
        assert "there is no such folder; needed: a folder with a Qwen3 checkpoint" in capsys.readouterr().err
    assert cli.main(["explain", "--model", str(tmp_path / "file")]) == 2
    assert "is a file; needed: a folder" in capsys.readouterr().err


def test_missing_tokenizer(broken: Broken, capsys: pytest.CaptureFixture[str]) -> None:
    folder = broken(lambda f: (f / "tokenizer.json").unlink())
    assert cli.main(["generate", "--model", str(folder), "--prompt", "x"]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err


def test_damaged_tokenizer(broken: Broken) -> None:
    folder = broken(lambda f: (f / "tokenizer.json").write_text("{}"))
    with pytest.raises(CheckpointError, match="the tokenizer in .* cannot be loaded"):
        checkpoints.load_tokenizer(folder)


def test_too_little_memory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.machine, "memory_bytes", lambda: (1000, 1000))
    with pytest.raises(QwenoptError, match=r"needs 0\.0 GB of memory, and 0\.0 GB are free"):
        checkpoints.load(checkpoint)


def test_names_of_shipped_models() -> None:
    assert checkpoints.locate("dense").name == "dense"
    assert checkpoints.locate("~/x") == Path.home() / "x"


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "torch.bfloat16"), ("float32", "torch.float32")])
def test_load(checkpoint: Path, dtype: str, expected: str) -> None:
    model = checkpoints.load(checkpoint, dtype)
    assert str(model.dtype) == expected
    assert not model.training
