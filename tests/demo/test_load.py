"""Loading the shipped checkpoints, and what a wrong name or a broken folder says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwenopt.demo.load import CHECKPOINT_FILES, DEMO_NAMES, check_checkpoint, demo_model, demo_path, load_checkpoint
from qwenopt.errors import CheckpointError


def test_import_is_cheap() -> None:
    code = "import sys, qwenopt.demo; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'tokenizers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_models_are_real_qwen3(name: str) -> None:
    model, tokenizer = demo_model(name)
    config = model.config
    assert type(model).__name__ == {"dense": "Qwen3ForCausalLM", "moe": "Qwen3MoeForCausalLM"}[name]
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert config.num_attention_heads // config.num_key_value_heads in (2, 4)
    assert config.head_dim != config.hidden_size // config.num_attention_heads
    assert config.tie_word_embeddings == (name == "dense")
    assert config.vocab_size >= len(tokenizer)
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == [end, pad]
    assert model.generation_config.pad_token_id == config.pad_token_id == pad
    if name == "moe":
        assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (8, 2, True)
        assert all(type(layer.mlp).__name__ == "Qwen3MoeSparseMoeBlock" for layer in model.model.layers)


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_dtype_is_obeyed_and_files_are_small(name: str) -> None:
    model, _ = demo_model(name, torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (demo_path(name) / "model.safetensors").stat().st_size <= 4_000_000
    assert all((demo_path(name) / file).is_file() for file in CHECKPOINT_FILES)


def test_unknown_name_is_named() -> None:
    with pytest.raises(ValueError, match="'big'.*'dense' or 'moe'"):
        demo_model("big")


def test_missing_folder_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere.*model.safetensors"):
        check_checkpoint(tmp_path / "nowhere")
    folder = shutil.copytree(demo_path("dense"), tmp_path / "dense")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks model.safetensors"):
        load_checkpoint(folder)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    folder = shutil.copytree(demo_path("dense"), tmp_path / "dense")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="dense is damaged"):
        load_checkpoint(folder)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(demo_path("dense"), tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    with pytest.raises(CheckpointError, match="no Qwen3 model"):
        load_checkpoint(folder)
