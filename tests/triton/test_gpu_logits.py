"""top_tokens and logit_signals on a GPU: the ids of a stable sort, entropies as accurate as eager's."""

from __future__ import annotations

import pytest
import torch

from qwenopt.ops import LOGIT_SIGNALS, TOP_TOKENS
from qwenopt.testing.formulas import logit_signals as formula
from qwenopt.testing.tolerance import assert_as_accurate

pytestmark = pytest.mark.gpu

VOCAB = 151936


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_logits_of_a_step(dtype: torch.dtype) -> None:
    logits = torch.randn(3, VOCAB).to(dtype)
    for k in (1, 20, 64):
        values, ids = TOP_TOKENS(logits.cuda(), k)
        wanted = logits.sort(dim=-1, descending=True, stable=True)[1][:, :k]
        assert torch.equal(ids.cpu(), wanted)
        assert torch.equal(values.cpu(), logits.gather(1, wanted))
    found, eager = LOGIT_SIGNALS(logits.cuda(), 7, True).cpu(), LOGIT_SIGNALS.reference(logits, 7, True)
    assert torch.equal(found[:, 0], eager[:, 0])
    assert_as_accurate(found[:, 1], eager[:, 1], formula(logits, 7, True)[:, 1])
