"""Hugging Face continuous batching on our kernels: the tokens of `generate`, what is refused, and one graph for all."""

from __future__ import annotations

import json
import random
import socket
import time
import urllib.request
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.utils import is_accelerate_available, is_psutil_available
from transformers.utils.import_utils import is_serve_available

import qwenopt
from qwenopt.demo.evaluate import prompt_ids
from qwenopt.demo.load import demo_model, demo_path
from qwenopt.demo.task import unseen_questions
from qwenopt.errors import QwenoptError
from qwenopt.runtime.continuous_batching import NAME, _pool_views, _step, serve, use_continuous_batching
from qwenopt.testing.models import tiny_model

needs_psutil = pytest.mark.skipif(not is_psutil_available(), reason="transformers sizes its cache through psutil")
NEW_TOKENS = 12


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, 128) for _ in range(length)] for length in lengths]


def tiny(name: str = "0.6B", **changes: Any) -> Any:
    return tiny_model(name, max_position_embeddings=2048, **changes)


def generation(**changes: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0} | changes)


def batching(page_size: int = 16, **changes: Any) -> ContinuousBatchingConfig:
    values = {"page_size": page_size, "num_blocks": 2048 // page_size, "max_batch_tokens": 64}
    return ContinuousBatchingConfig(**values | changes)


def by_generate(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The greedy tokens of each prompt alone, by `model.generate` with attention of transformers."""
    config = generation(eos_token_id=model.generation_config.eos_token_id)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0])
    return [row[len(prompt) :].tolist() for row, prompt in zip(found, prompts, strict=True)]


def by_batches(model: Any, prompts: list[list[int]], **changes: Any) -> list[list[int]]:
    eos = model.generation_config.eos_token_id
    config = generation(eos_token_id=-1 if eos is None else eos)
    found = model.generate_batch(prompts, config, continuous_batching_config=batching(**changes)).values()
    assert not [one.error for one in found if one.error]
    return [one.generated_tokens for one in found]


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@needs_psutil
@pytest.mark.parametrize("page_size", [4, 16, 256])
@pytest.mark.parametrize("name", ["0.6B", "30B-A3B"])
def test_tokens_are_those_of_generate(name: str, page_size: int) -> None:
    model = tiny(name)
    prompts = random_prompts([1, 2, 15, 16, 17, 40, 90, 130, 3, 64, 200, 31])
    wanted = by_generate(model, prompts)
    with use_continuous_batching(model):  # 5 at a time: the others join as those end
        assert by_batches(model, prompts, page_size=page_size, max_requests_per_batch=5) == wanted
    assert len({tuple(row) for row in wanted}) == len(wanted)


@needs_psutil
@pytest.mark.parametrize("sharing", [True, False])
def test_a_shared_beginning_is_prefilled_once(sharing: bool) -> None:
    model = tiny()
    start, *ends = random_prompts([70, 1, 2, 9, 20])
    prompts = [start + end for end in ends]
    wanted = by_generate(model, prompts)
    seen: list[int] = []
    counter = model.model.embed_tokens.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    with use_continuous_batching(model), counter:
        config = batching(allow_block_sharing=sharing)
        with model.continuous_batching_context_manager(
            generation(eos_token_id=-1), continuous_batching_config=config
        ) as m:
            for prompt, tokens in zip(prompts, wanted, strict=True):
                request = m.add_request(prompt)
                assert next(m.request_id_iter(request)).generated_tokens == tokens
    total = sum(len(p) + NEW_TOKENS - 1 for p in prompts)
    assert sum(seen) == total - (3 * 64 if sharing else 0)


@needs_psutil
def test_requests_join_leave_and_are_cancelled() -> None:
    model = tiny()
    prompts = random_prompts([5, 60, 33, 8, 100])
    wanted = by_generate(model, prompts)
    with use_continuous_batching(model):
        config = batching()
        with model.continuous_batching_context_manager(
            generation(eos_token_id=-1), continuous_batching_config=config
        ) as m:
            m.add_request(prompts[0], request_id="gone", max_new_tokens=1500)
            ids = [m.add_request(p, max_new_tokens=2 + 2 * i) for i, p in enumerate(prompts[1:], 1)]
            found = {}
            while len(found) < 4:
                result = m.get_result(timeout=30)
                found[result.request_id] = result.generated_tokens
                m.cancel_request("gone")
            assert "gone" not in found
    assert [found[i] for i in ids] == [row[: 2 + 2 * n] for n, row in enumerate(wanted[1:], 1)]


@needs_psutil
def test_forked_requests() -> None:
    model = tiny()
    prompts = random_prompts([37, 9])
    wanted = by_generate(model, prompts)
    with use_continuous_batching(model):
        config = generation(eos_token_id=-1, num_return_sequences=3, do_sample=True, top_k=1)  # greedy may not fork
        found = model.generate_batch(prompts, config, continuous_batching_config=batching()).values()
    assert [one.generated_tokens for one in found] == [row for row in wanted for _ in range(3)]


@needs_psutil
def test_a_compiled_model_needs_one_graph() -> None:
    model = tiny()
    wanted = by_generate(model, prompts := random_prompts([1, 20, 64, 3, 110]))
    qwenopt.compile(model, lowering="direct", strict=True)
    with use_continuous_batching(model):
        before = graphs()
        assert by_batches(model, prompts) == wanted
        assert graphs() == before + 1
        sites = qwenopt.last_report().graphs[-1].sites
        layers = model.config.num_hidden_layers
        assert [sum(s.op == op for s in sites) for op in ("kv_append", "paged_attention")] == [layers, layers]
        assert by_batches(model, prompts[:1]) == wanted[:1]  # one row, one token, one page
        assert by_batches(model, prompts, max_batch_tokens=7, max_requests_per_batch=2) == wanted
        assert graphs() == before + 1


@needs_psutil
@pytest.mark.parametrize("compiled", [False, True])
def test_the_demo_model(compiled: bool) -> None:
    model, tokenizer = demo_model("dense", torch.float32)
    prompts = [list(prompt_ids(tokenizer, q, i % 2 == 0)) for i, q in enumerate(unseen_questions(6))]
    wanted = by_generate(model, prompts)
    if compiled:
        qwenopt.compile(model, lowering="direct")
    with use_continuous_batching(model):
        assert by_batches(model, prompts, page_size=32) == wanted


@needs_psutil
def test_the_model_is_given_back() -> None:
    model = tiny()
    (prompt,) = random_prompts([9])
    wanted = by_generate(model, [prompt])
    handle = use_continuous_batching(model)
    assert model.config._attn_implementation == NAME
    with pytest.raises(QwenoptError, match="switched already"):
        use_continuous_batching(model)
    with pytest.raises(QwenoptError, match="outside continuous batching while use_continuous_batching is on"):
        model(torch.tensor([prompt]))
    handle.remove()
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert by_generate(model, [prompt]) == wanted
    assert by_batches(model, [prompt]) == wanted


def test_attention_chosen_by_its_name_alone_is_refused() -> None:
    model = tiny()
    use_continuous_batching(model).remove()
    model.config._attn_implementation = NAME
    with pytest.raises(QwenoptError, match=r"choose it with qwenopt\.use_continuous_batching"):
        model(torch.tensor([[1, 2]]))


@pytest.fixture
def psutil_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.utils, "is_psutil_available", lambda: True)


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


@needs_psutil
@pytest.mark.slow
@pytest.mark.skipif(
    not (is_serve_available() and is_accelerate_available()),
    reason="needs pip install transformers[serving] accelerate",
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
