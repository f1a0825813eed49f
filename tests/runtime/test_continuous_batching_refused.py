"""Hugging Face continuous batching on our kernels: what is refused, older pools, and `transformers serve`."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.utils import is_accelerate_available, is_psutil_available
from transformers.utils.import_utils import is_serve_available

from qwenopt.demo.load import demo_path
from qwenopt.errors import QwenoptError
from qwenopt.runtime.continuous_batching import NAME, _pool_views, _step, serve, use_continuous_batching
from qwenopt.testing.models import tiny_model


def tiny(**changes: Any) -> Any:
    return tiny_model("0.6B", **changes)


@pytest.fixture
def psutil_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.utils, "is_psutil_available", lambda: True)


@pytest.mark.usefixtures("psutil_is_there")
def test_attention_chosen_by_its_name_alone_is_refused() -> None:
    model = tiny()
    use_continuous_batching(model).remove()
    model.config._attn_implementation = NAME
    with pytest.raises(QwenoptError, match=r"choose it with qwenopt\.use_continuous_batching"):
        model(torch.tensor([[1, 2]]))


@pytest.mark.usefixtures("psutil_is_there")
def test_models_that_are_refused() -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    llama = transformers.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=8)
    for model, text in [
        (transformers.LlamaForCausalLM(llama), "LlamaForCausalLM of type 'llama'; needed a causal model of type qwen3"),
        (tiny().model, "Qwen3Model of type 'qwen3'; needed a causal model"),
        (torch.nn.Linear(1, 1), "Linear of type None"),
        (tiny(**window), "sliding_window=8 in some layers; needed full attention in all"),
        (tiny().double(), "a model in torch.float64; needed torch.float32, torch.bfloat16"),
    ]:
        with pytest.raises(QwenoptError, match=text):
            use_continuous_batching(model)


def test_surroundings_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(transformers.utils, "is_psutil_available", lambda: False)
    with pytest.raises(QwenoptError, match="no psutil; .*pip install psutil"):
        use_continuous_batching(model)
    import transformers as current  # made anew when its first model class was loaded

    monkeypatch.setattr(current, "__version__", "4.57.6")
    with pytest.raises(QwenoptError, match=r"transformers 4\.57\.6; needed a release of transformers 5"):
        use_continuous_batching(model)
    assert model.config._attn_implementation == "sdpa"


def test_pools_of_releases_before_5_18() -> None:
    keys, values = torch.randn(2, 5 * 8, 3, 4), torch.randn(2, 5 * 8, 3, 4)
    indices = {0: (0, 0), 1: (0, 1)}
    cache = SimpleNamespace(layer_index_to_group_indices=indices, key_cache=keys, value_cache=values, block_size=8)
    k, v = _pool_views(cache, 1)
    assert k.shape == v.shape == (5, 3, 8, 4)
    assert torch.equal(k[2, 1, 3], keys[1, 2 * 8 + 3, 1])
    assert v.data_ptr() == values[1].data_ptr()
    with pytest.raises(QwenoptError, match="a cache SimpleNamespace without layer_to_allocator"):
        _pool_views(SimpleNamespace(), 0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"read_index": None}, "no single read_index"),
        ({"write_index": [torch.zeros(3), torch.zeros(3)]}, "no single write_index"),
        ({"cu_seq_lens_k": {"full_attention": torch.zeros(2), "other": torch.zeros(2)}}, "no single cu_seq_lens_k"),
        ({"max_length_k": None}, "no single max_length_k or max_seqlen_k"),
        ({"block_table": torch.zeros(1, 1, 1)}, "a block table to an attention"),
    ],
)
def test_a_call_that_is_not_as_we_know_it_is_refused(change: dict[str, Any], text: str) -> None:
    starts = torch.tensor([0, 3], dtype=torch.int32)
    call = {"write_index": [torch.tensor([8, 9, 10])], "read_index": [torch.tensor([], dtype=torch.int64)]}
    call |= {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": {"full_attention": starts},
        "max_length_k": {"full_attention": 3},
    }
    call |= {"position_ids": torch.tensor([[0, 1, 2]])}
    pools = (torch.zeros(4, 1, 4, 8),)
    assert _step(call, pools, pools).block_table.tolist() == [[2]]
    with pytest.raises(QwenoptError, match=f"transformers {transformers.__version__} passes {text}"):
        _step(call | change, pools, pools)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for attempt in range(100):
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)
        except ConnectionError:
            time.sleep(0.1)
        except urllib.error.URLError as error:
            if attempt == 99 or not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(0.1)
    return None


@pytest.mark.slow
@pytest.mark.skipif(
    not (is_serve_available() and is_accelerate_available() and is_psutil_available()),
    reason="needs transformers[serving], accelerate and psutil",
)
def test_serve() -> None:
    port, path = free_port(), str(demo_path("dense"))
    server = serve(
        path, compile=False, port=port, dtype="float32", device="cpu", cb_num_blocks=16, cb_max_batch_tokens=64
    )
    try:
        body = {
            "model": path,
            "messages": [{"role": "user", "content": "12 + 30 = ?"}],
            "max_tokens": 16,
            "temperature": 0,
        }
        answer = post(f"http://127.0.0.1:{port}/v1/chat/completions", body)
    finally:
        server.kill_server()
    message = answer["choices"][0]["message"]
    assert (message["content"] or message["reasoning_content"]).strip()
