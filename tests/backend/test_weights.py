"""Weights that change after compilation are seen by the next call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qwenopt.backend import compile_graph
from qwenopt.testing.decode import one_thread, prompt
from qwenopt.testing.models import tiny_model
from qwenopt.testing.tolerance import assert_near_eager

LOWERINGS = [("0.6B", "direct"), ("30B-A3B", "direct"), pytest.param("0.6B", "inductor", marks=pytest.mark.slow)]


class Compiled:
    """A compiled model beside eager calls of the same weights."""

    def __init__(self, name: str, lowering: str) -> None:
        self.model = tiny_model(name)
        self.ids, _ = prompt(self.model.config, 1)
        self.model.compile(backend=compile_graph, options={"lowering": lowering})

    @torch.no_grad()
    def check(self) -> Tensor:
        """Compiled equals eager now; returns the logits."""
        with one_thread():
            wanted = self.model.forward(self.ids, use_cache=False).logits
            found = self.model(self.ids, use_cache=False).logits
        assert_near_eager(found, wanted)
        return found


@pytest.mark.parametrize(("name", "lowering"), LOWERINGS)
def test_changed_weights_are_seen(name: str, lowering: str) -> None:
    compiled = Compiled(name, lowering)
    before = compiled.check()
    with torch.no_grad():
        for p in compiled.model.parameters():
            p.mul_(1.25)
    scaled = compiled.check()
    assert not torch.allclose(before, scaled)
    compiled.model.load_state_dict(tiny_model(name, seed=1).state_dict())
    assert not torch.allclose(compiled.check(), scaled)


def test_replaced_parameters_are_seen() -> None:
    compiled = Compiled("0.6B", "direct")
    before = compiled.check()
    head = compiled.model.model.layers[0].mlp.down_proj
    head.weight = nn.Parameter(torch.randn_like(head.weight), requires_grad=False)
    assert not torch.allclose(compiled.check(), before)


def test_state_dict_assigned_is_seen() -> None:
    compiled = Compiled("0.6B", "direct")
    before = compiled.check()
    compiled.model.load_state_dict(tiny_model("0.6B", seed=2).state_dict(), assign=True)
    compiled.model.tie_weights()
    assert not torch.allclose(compiled.check(), before)


def test_model_cast_after_compilation_is_seen() -> None:
    compiled = Compiled("0.6B", "direct")
    compiled.check()
    compiled.model.to(torch.bfloat16)
    with torch.no_grad(), one_thread():
        assert compiled.model(compiled.ids, use_cache=False).logits.dtype == torch.bfloat16


def test_weights_stay_where_they_are() -> None:
    compiled = Compiled("0.6B", "direct")
    addresses = {k: p.data_ptr() for k, p in compiled.model.named_parameters()}
    compiled.check()
    assert {k: p.data_ptr() for k, p in compiled.model.named_parameters()} == addresses
