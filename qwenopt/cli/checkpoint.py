"""Checkpoints that a user names, looked at before transformers reads them, so that what is wrong can be said."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenopt.cli import machine
from qwenopt.errors import CheckpointError, QwenoptError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_TYPES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
NEEDED = "needed: a folder with a Qwen3 checkpoint (config.json, *.safetensors and, to handle text, tokenizer.json)"
MAX_ERROR_CHARACTERS = 400
INDEX = "model.safetensors.index.json"


def locate(model: str) -> Path:
    """The folder of a demo model's name ("dense", "moe"), else `model` itself as a path."""
    from qwenopt.demo import DEMO_NAMES, demo_path

    if model in DEMO_NAMES and not Path(model).is_dir():
        return demo_path(model)
    return Path(model).expanduser()


def check(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a complete Qwen3 checkpoint. Raises CheckpointError that names what is amiss."""
    if not folder.exists():
        raise CheckpointError(f"{folder}: there is no such folder; {NEEDED}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; {NEEDED}")
    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise CheckpointError(f"{folder}: model_type is {kind!r}; needed: {' or '.join(MODEL_TYPES)}")
    architectures = config.get("architectures") or [MODEL_TYPES[kind]]
    if MODEL_TYPES[kind] not in architectures:
        raise CheckpointError(f"{folder}: architectures are {architectures}; needed: {MODEL_TYPES[kind]}")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "of some kind")
        raise CheckpointError(
            f"{folder}: the weights are quantised ({method}); needed: a checkpoint in bfloat16, float16 or float32"
        )
    for path in _weight_files(folder):
        check_safetensors(path)
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}; {NEEDED}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}; fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; needed: an object; fetch the file again")
    return value


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names = sorted(set((_read_json(folder / INDEX).get("weight_map") or {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which {INDEX} lists; fetch the missing files")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    found = f" (it has {', '.join(pickled)}; convert with save_pretrained)" if pickled else ""
    raise CheckpointError(f"{folder} has no model.safetensors and no {INDEX}{found}; {NEEDED}")


def check_safetensors(path: Path) -> None:
    """Raise CheckpointError unless the file's header is whole and the file as long as the header promises."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"{path} is no safetensors file or was cut short ({size} bytes); fetch it again")
        header = file.read(length)
    try:
        tensors = json.loads(header)
        ends = [t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error}; fetch it again") from error
    promised = 8 + length + max(ends, default=0)
    if size != promised:
        raise CheckpointError(f"{path} has {size} bytes where its header promises {promised}; fetch it again")


def weight_bytes(folder: Path) -> int:
    """Bytes of all weight files."""
    return sum(path.stat().st_size for path in _weight_files(folder))


def check_memory(bytes_needed: int, what: str) -> None:
    """Raise before the system would have to kill the process for lack of memory."""
    available = machine.memory_bytes()[1]
    if available and bytes_needed > available:
        raise QwenoptError(
            f"{what} needs {bytes_needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free; "
            "close other programs, take a smaller model, or a smaller --dtype"
        )


def load(folder: Path, dtype: str = "auto") -> PreTrainedModel:
    """The model of a checked folder, in evaluation mode. `dtype` is "auto" (as stored) or a torch dtype's name."""
    import torch
    from transformers import AutoModelForCausalLM

    config = check(folder)
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    wider = torch.float32.itemsize / getattr(torch, stored).itemsize if dtype == "float32" else 1
    check_memory(int(weight_bytes(folder) * wider), f"the model in {folder}")
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=wanted, local_files_only=True, output_loading_info=True
            )
    except Exception as error:
        # A damaged configuration surfaces as one of many library errors; say which folder it was.
        raise CheckpointError(f"{folder} cannot be loaded as a Qwen3 checkpoint: {_one_line(error)}") from error
    missing = sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} weights are missing or of another shape than config.json says, "
            f"such as {missing[0]}; fetch the checkpoint again"
        )
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder. Raises CheckpointError where there is none or it cannot be read."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(f"{folder} has no tokenizer.json; needed to turn text into tokens")
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be loaded: {_one_line(error)}; fetch its files again"
        ) from error


def _one_line(error: Exception) -> str:
    """The beginning of a library's error, which may be a page long."""
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_ERROR_CHARACTERS else text[:MAX_ERROR_CHARACTERS] + " ..."


def parameters(model: torch.nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and loading tables out of the commands' output."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
