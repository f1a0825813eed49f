"""Full-size Qwen3 checkpoints with random weights, for measuring speed where no trained ones can be fetched.

A checkpoint is written once, tensor by tensor and in the published layout (experts one by one), so that building it
needs next to no memory and any other program that reads Qwen3 can read it too.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qwenopt.errors import QwenoptError

if TYPE_CHECKING:
    from torch import Tensor

# Raised when what is written changes, so that an older folder is not taken for the new one.
LAYOUT = 1
SHARD_BYTES = 2_000_000_000
BLOCK_ELEMENTS = 1 << 22
STD = 0.02
BF16_BYTES = 2

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Size:
    """A model to build: the published model that it follows, and what differs from it."""

    name: str
    model: str
    changes: tuple[tuple[str, int], ...] = ()

    def config(self) -> Any:
        """Its transformers configuration."""
        import torch

        from qwenopt.testing.models import full_config

        return full_config(self.model, dtype=torch.bfloat16, **dict(self.changes))


SIZES: dict[str, Size] = {
    size.name: size for size in (Size("0.6b", "0.6B"), Size("30b-a3b-4l", "30B-A3B", (("num_hidden_layers", 4),)))
}


def cache_root() -> Path:
    """Where built checkpoints are kept: `$XDG_CACHE_HOME/qwenopt`, by default `~/.cache/qwenopt`."""
    root = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "qwenopt"


def folder_of(name: str, root: Path | None = None) -> Path:
    """Where the checkpoint of that name is, or will be."""
    return (root or cache_root()) / f"qwen3-{name}-random-{LAYOUT}"


def tensors(config: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, as published checkpoints have them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found: list[tuple[str, tuple[int, ...]]] = []
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found.extend(_published(name, tuple(value.shape)))
    return found


def _published(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """One tensor of transformers as the ones it has in a published checkpoint: experts are stored one by one."""
    prefix, _, last = name.rpartition(".")
    if not prefix.endswith(".experts"):
        yield name, shape
        return
    for expert in range(shape[0]):
        if last == "gate_up_proj":
            for part in ("gate_proj", "up_proj"):
                yield f"{prefix}.{expert}.{part}.weight", (shape[1] // 2, shape[2])
        else:
            yield f"{prefix}.{expert}.{last}.weight", shape[1:]


def _num_bytes(shape: tuple[int, ...]) -> int:
    count = BF16_BYTES
    for length in shape:
        count *= length
    return count


def total_bytes(config: Any) -> int:
    """Bytes of all weights in bfloat16."""
    return sum(_num_bytes(shape) for _, shape in tensors(config))


def build(config: Any, folder: Path, progress: Progress | None = None) -> Path:
    """Write a checkpoint of `config` to `folder`; does nothing where it is there already.

    It is written under a temporary name and moved when whole, so an interrupted build leaves nothing that could be
    taken for a checkpoint. `progress` is told the bytes written so far. Raises QwenoptError if the disk is too small.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QwenoptError(f"{folder.parent} cannot be made: {error.strerror}; set XDG_CACHE_HOME") from error
    _remove_leftovers(folder)
    found = tensors(config)
    _check_disk(folder.parent, sum(_num_bytes(shape) for _, shape in found))
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir()
        _write_weights(found, temporary, progress)
        config.architectures = ["Qwen3MoeForCausalLM" if config.model_type == "qwen3_moe" else "Qwen3ForCausalLM"]
        config.save_pretrained(temporary)
        os.rename(temporary, folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster, and its result is as good
            raise QwenoptError(f"{folder} cannot be written: {error.strerror}; set XDG_CACHE_HOME") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed builds left behind."""
    for path in folder.parent.glob(f"{folder.name}.tmp-*"):
        pid = path.name.rpartition("-")[2]
        if not (pid.isdigit() and _is_alive(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02:
        raise QwenoptError(
            f"{folder} has {free / 1e9:.1f} GB free; needed: {needed / 1e9:.1f} GB for random weights; "
            "free some space, or set XDG_CACHE_HOME to a folder on a larger disk"
        )


def _write_weights(found: list[tuple[str, tuple[int, ...]]], folder: Path, progress: Progress | None) -> None:
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in found:
        if shards[-1] and size + _num_bytes(shape) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += _num_bytes(shape)
    single = len(shards) == 1
    done, where = 0, {}
    for i, shard in enumerate(shards, 1):
        file_name = "model.safetensors" if single else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file_name).open("wb") as file:
            done = _write_shard(shard, file, done, progress)
        where.update({name: file_name for name, _ in shard})
    if not single:
        index = {"metadata": {"total_size": done}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_shard(shard: list[tuple[str, tuple[int, ...]]], file: BinaryIO, done: int, progress: Progress | None) -> int:
    """Write one safetensors file; returns the bytes of weights written so far, over all files."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard:
        end = offset + _num_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name, shape in shard:
        for block in _values(name, shape):
            file.write(block.numpy().data)
            done += block.nbytes
            if progress is not None:
                progress(done)
    return done


def _values(name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The bits of a tensor in blocks: ones for norms, else normal noise that depends on the name alone."""
    import torch

    left = _num_bytes(shape) // BF16_BYTES
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    while left:
        count = min(left, BLOCK_ELEMENTS)
        left -= count
        is_norm = len(shape) == 1
        block = torch.ones(count) if is_norm else torch.randn(count, generator=generator).mul_(STD)
        yield block.to(torch.bfloat16).view(torch.int16)


def ensure(name: str, progress: Progress | None = None, root: Path | None = None) -> Path:
    """The folder of the full-size model `name`, built if it is not there. Raises QwenoptError for another name."""
    if name not in SIZES:
        raise QwenoptError(f"size {name!r}; needed: one of {', '.join(SIZES)}")
    folder = folder_of(name, root)
    return folder if folder.is_dir() else build(SIZES[name].config(), folder, progress)
