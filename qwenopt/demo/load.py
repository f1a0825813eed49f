"""Loads the demo models that are stored in this package's ``models`` folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwenopt.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO_NAMES: tuple[str, ...] = ("dense", "moe")
CHECKPOINT_FILES: tuple[str, ...] = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def demo_path(name: str) -> Path:
    """Return the checkpoint folder of the demo model ``name`` ("dense" or "moe").

    Raises:
        ValueError: ``name`` is neither of the two.
    """
    if name not in DEMO_NAMES:
        raise ValueError(f"unknown demo model {name!r}: the name must be 'dense' or 'moe'")
    return Path(__file__).resolve().parent / "models" / name


def check_checkpoint(folder: Path) -> None:
    """Raise ``CheckpointError`` that lists what ``folder`` lacks of a checkpoint's files."""
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder at {folder}: it must hold {', '.join(CHECKPOINT_FILES)}")
    missing = [file for file in CHECKPOINT_FILES if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(f"checkpoint folder {folder} lacks {', '.join(missing)}; reinstall or retrain it")


def load_checkpoint(folder: Path, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model (evaluation mode) and tokenizer of a checkpoint folder, without the network.

    Args:
        folder: a folder with every file of ``CHECKPOINT_FILES``.
        dtype: the weights' type; ``None`` keeps the stored one (bfloat16 for the shipped models).

    Raises:
        CheckpointError: a file is missing, damaged or of another kind of model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_checkpoint(folder)
    chosen = "auto" if dtype is None else dtype
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=chosen, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # A truncated or edited file surfaces as one of many library errors; say which folder it was.
        raise CheckpointError(
            f"checkpoint folder {folder} is damaged or holds no Qwen3 model: {error}; reinstall or retrain it"
        ) from error
    return model.eval(), tokenizer


def demo_model(name: str, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the shipped demo model ``name`` ("dense" or "moe") and its tokenizer.

    Args:
        name: "dense" (``Qwen3ForCausalLM``) or "moe" (``Qwen3MoeForCausalLM``).
        dtype: the weights' type; ``None`` keeps the stored bfloat16.

    Raises:
        ValueError: unknown name.
        CheckpointError: the package's checkpoint folder or one of its files is missing or damaged.
    """
    return load_checkpoint(demo_path(name), dtype)
