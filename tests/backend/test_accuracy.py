"""16 bits: logits no further from a float64 model than twice eager's logits of the same type are, plus one ulp."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qwenopt
from qwenopt import native
from qwenopt.backend import compile_graph
from qwenopt.testing.decode import make_cache, one_thread, prompt
from qwenopt.testing.models import tiny_model
from qwenopt.testing.replies import prompts_for
from qwenopt.testing.tolerance import assert_as_accurate


@torch.no_grad()
def prefill_and_decode(
    model: nn.Module, ids: Tensor, mask: Tensor | None, following: Tensor, cache: Any = None
) -> list[Tensor]:
    """Logits of the prompt's real tokens, then of each following token."""
    cache = make_cache("dynamic", model.config, 0) if cache is None else cache
    logits = [model(ids, attention_mask=mask, past_key_values=cache).logits]
    if mask is not None:
        logits = [logits[0][mask.bool()]]
    for step in following.T:
        mask = mask if mask is None else torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        logits.append(model(step[:, None], attention_mask=mask, past_key_values=cache).logits)
    return logits


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["1.7B", "14B", "30B-A3B", "235B-A22B"])
def test_bfloat16_logits_are_as_accurate_as_eager(name: str, batch: int) -> None:
    check_accuracy(name, batch, "direct")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1.7B", "30B-A3B"])
def test_bfloat16_logits_of_inductor_lowering_are_as_accurate_as_eager(name: str) -> None:
    check_accuracy(name, 1, "inductor")


@pytest.mark.parametrize("name", ["1.7B", "30B-A3B"])
def test_float16_has_a_kernel_everywhere_and_is_as_accurate_as_eager(name: str) -> None:
    torch.compiler.reset()
    model = check_accuracy(name, 2, "direct", torch.float16, paged=True)
    out = qwenopt.generate(
        model, prompts_for(model, [40, 5]), max_new_tokens=4, prefill_tokens=24, temperature=0, eos_token_id=()
    )
    assert [len(row) for row in out.replies] == [4, 4]
    report = qwenopt.last_report()
    by_generate = 1 if native.available() else 2  # Inductor's functions do not serve both
    assert len(report.graphs) == 2 + by_generate, "prefill and decode by calls, and by generate"
    assert not report.misses
    if native.available():
        assert all(g.lowering == "direct" for g in report.graphs)
        # Where torch has products of float16 they are faster from 17 rows on, and none of them is a step.
        prefill = native.cpu_isa() != "generic" and not torch.ops.mkldnn._is_mkldnn_fp16_supported()
        assert [bool(g.plan_steps) for g in report.graphs] == [prefill, True, prefill]
        assert not report.fallbacks
    else:
        assert len(report.fallbacks) == len(report.sites), "without kernels every op is its reference"


def check_accuracy(
    name: str, batch: int, lowering: str, dtype: torch.dtype = torch.bfloat16, *, paged: bool = False
) -> nn.Module:
    # All experts are chosen: a router near a tie would jump between experts by rounding, in eager as well.
    model = tiny_model(name, dtype, **({"num_experts_per_tok": 8, "num_experts": 8} if "A" in name else {}))
    pages: Any = {"max_batch_size": batch, "num_pages": 2 * batch, "dtype": dtype}
    cache = qwenopt.PagedKVCache(model.config, **pages) if paged else None
    ids, mask = prompt(model.config, batch, 9)
    following = torch.randint(0, model.config.vocab_size, (batch, 4), generator=torch.Generator().manual_seed(1))
    truth_model = copy.deepcopy(model).double()
    if model.config.model_type == "qwen3_moe":
        truth_model.set_experts_implementation("eager")  # grouped products are not made in float64
    with one_thread():
        truth = prefill_and_decode(truth_model, ids, mask, following)
        eager = prefill_and_decode(model, ids, mask, following)
        model.compile(backend=compile_graph, options={"lowering": lowering, "strict": True})
        found = prefill_and_decode(model, ids, mask, following, cache)
    for a, e, t in zip(found, eager, truth, strict=True):
        assert_as_accurate(a, e, t)
    return model
