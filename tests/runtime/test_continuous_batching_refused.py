"""Hugging Face continuous batching on our kernels: what is refused, older pools, and `transformers serve`."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.utils import is_accelerate_available, is_psutil_available
from transformers.utils.import_utils import is_serve_available

import qwenopt
from qwenopt.demo.load import demo_model, demo_path
from qwenopt.errors import QwenoptError
from qwenopt.runtime.continuous_batching import NAME, _step, serve, use_continuous_batching
from qwenopt.runtime.continuous_batching_pools import Pools, pools_of
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
    other = tiny()
    other.config.layer_types = ["linear_attention", "full_attention"]
    llama = transformers.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=8)
    for model, text in [
        (transformers.LlamaForCausalLM(llama), "LlamaForCausalLM of type 'llama'; needed a causal model of type qwen3"),
        (tiny().model, "Qwen3Model of type 'qwen3'; needed a causal model"),
        (torch.nn.Linear(1, 1), "Linear of type None"),
        (other, "layers of linear_attention; needed full or sliding attention"),
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
    pools = pools_of(cache, 2)
    k, v = pools.of(1)
    assert k.shape == v.shape == (5, 3, 8, 4)
    assert torch.equal(k[2, 1, 3], keys[1, 2 * 8 + 3, 1])
    assert v.data_ptr() == values[1].data_ptr()
    assert len(pools.memories) == 2
    with pytest.raises(QwenoptError, match="a cache SimpleNamespace without layer_to_allocator"):
        pools_of(SimpleNamespace(), 1)


def test_pools_in_one_memory_that_do_not_lie_as_they_are_known_to_are_refused() -> None:
    memory = torch.zeros(100 * 8 * 3, 4)
    views = {0: (memory[:480], memory[24 * 3 : 552]), 1: (memory[7:487], memory[24 * 4 : 576])}
    allocator = SimpleNamespace(
        get_cache_for_block_table=lambda layer: tuple(x.view(-1, 8, 3, 4) for x in views[layer])
    )
    cache = SimpleNamespace(layer_to_allocator=[allocator, allocator])
    assert pools_of(cache, 1).keys == ((0, 0, -3),)
    with pytest.raises(QwenoptError, match=r"pools of shapes \(20, 3, 8, 4\) and \(20, 3, 8, 4\) in one memory"):
        pools_of(cache, 2)


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
    pools = Pools((torch.zeros(4, 1, 4, 8), torch.zeros(4, 1, 4, 8)), ((0, 0, None),), ((1, 0, None),))
    assert _step(call, pools).block_table.tolist() == [[2]]
    with pytest.raises(QwenoptError, match=f"transformers {transformers.__version__} passes {text}"):
        _step(call | change, pools)


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
    """Several requests at once over HTTP get the text of `generate`, from the kernels."""
    model, tokenizer = demo_model("dense", torch.float32)
    asked = [[{"role": "user", "content": text}] for text in ("12 + 30 = ?", "7 + 8 = ?", "Hello")]
    wanted = []
    for messages in asked:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=16, do_sample=False)
        wanted.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).removeprefix("<think>"))

    port, path = free_port(), str(demo_path("dense"))
    server = serve(path, port=port, dtype="float32", device="cpu", cb_num_blocks=16, cb_max_batch_tokens=64)

    def ask(messages: list[dict[str, str]]) -> str:
        body = {"model": path, "messages": messages, "max_tokens": 16, "temperature": 0}
        message = post(f"http://127.0.0.1:{port}/v1/chat/completions", body)["choices"][0]["message"]
        return str((message.get("reasoning_content") or "") + message["content"])

    try:
        with ThreadPoolExecutor(len(asked)) as pool:
            found = list(pool.map(ask, asked))
    finally:
        server.kill_server()
    assert [text.strip() for text in found] == [text.strip() for text in wanted]
    (graph,) = qwenopt.last_report().graphs
    assert {site.provider for site in graph.sites if site.op in ("kv_append", "paged_attention")} == {"cpu"}
