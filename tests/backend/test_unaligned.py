"""A compiled model whose weights lie in a mapped safetensors file two bytes past any alignment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwenopt.backend import compile_graph
from qwenopt.testing import unaligned
from qwenopt.testing.decode import greedy, prompt
from qwenopt.testing.models import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["0.6B", "30B-A3B"])
def test_mapped_weights_give_the_tokens_of_aligned_ones(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(name, dtype)
    model.compile(backend=compile_graph, fullgraph=True, options={"lowering": "direct"})
    ids, _ = prompt(model.config, 1)
    wanted, gap = greedy(model, model.config, ids, None, cache="static", steps=16)
    unaligned.save(tmp_path / "model.safetensors", model.state_dict())
    model.load_state_dict(unaligned.load(tmp_path / "model.safetensors"), assign=True)
    model.tie_weights()
    assert all(p.data_ptr() % 4 == 2 for p in model.parameters())
    found, again = greedy(model, model.config, ids, None, cache="static", steps=16)
    assert torch.equal(found, wanted)
    assert again == gap, "the logits have other bits"
