"""The demo tokenizer: Qwen3's special tokens, byte-level round trips and chat format."""

import unicodedata

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qwenopt.demo import task
from qwenopt.demo.load import DEMO_NAMES, demo_path
from qwenopt.demo.tokenizer import PADDED_VOCAB_SIZE, build_tokenizer

QWEN3_CONTROL = [
    *["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"],
    *["<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"],
    *["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"],
]
QWEN3_TEXT = [
    *["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"],
    *["<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"],
]

TEXTS = [
    "Start with 7. 1) add 5.\n\n  Tabs\tand   spaces \n",
    "héllo Ünïcode 世界 😀 \u00a0 ½",
    "x = [1, 22, 333]\r\nprint('it''s')  # <|not_a_token|>",
    "".join(map(chr, range(32, 127))),
]


@pytest.fixture(scope="module", params=DEMO_NAMES)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo_path(request.param), local_files_only=True)


def test_added_tokens_are_qwen3s_in_order(tokenizer: PreTrainedTokenizerBase) -> None:
    added = sorted(tokenizer.added_tokens_decoder.items())
    assert [token.content for _, token in added] == QWEN3_CONTROL + QWEN3_TEXT
    first = added[0][0]
    assert [index for index, _ in added] == list(range(first, first + 26))
    assert [token.special for _, token in added] == [True] * 14 + [False] * 12
    assert len(tokenizer) == first + 26 <= PADDED_VOCAB_SIZE
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.bos_token is None
    assert tokenizer.unk_token is None


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    normal = unicodedata.normalize("NFC", text)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == normal
    assert max(ids) < len(tokenizer) - 26


def test_splits_like_qwen(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = [tokenizer.decode([index]) for index in tokenizer("12 345").input_ids]
    assert tokens == ["1", "2", " ", "3", "4", "5"]
    marks = tokenizer("a<think>b</think><|im_end|>").input_ids
    assert [tokenizer.decode([index]) for index in marks] == ["a", "<think>", "b", "</think>", "<|im_end|>"]
    # Hidden on request are the control tokens only, as in Qwen3.
    assert tokenizer.decode(marks, skip_special_tokens=True) == "a<think>b</think>"


def test_built_again_it_is_the_shipped_one(tokenizer: PreTrainedTokenizerBase) -> None:
    built = build_tokenizer()
    assert built.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert built.chat_template == tokenizer.chat_template


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_generation_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    user = [{"role": "user", "content": "hi"}]
    head = "<|im_start|>user\nhi<|im_end|>\n"
    opened = head + "<|im_start|>assistant\n"
    assert render(tokenizer, user) == head
    assert render(tokenizer, user, add_generation_prompt=True) == opened
    assert render(tokenizer, user, add_generation_prompt=True, enable_thinking=True) == opened
    closed = render(tokenizer, user, add_generation_prompt=True, enable_thinking=False)
    assert closed == opened + "<think>\n\n</think>\n\n"
    assert render(tokenizer, user, enable_thinking=False) == head


def test_history_loses_its_thinking(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfirst"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "<think>\nah\n</think>\n\nsecond"},
    ]
    assert render(tokenizer, messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\nfirst<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nah\n</think>\n\nsecond<|im_end|>\n"
    )


def test_reasoning_content_and_plain_last_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    user = {"role": "user", "content": "q"}
    head = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    reasoned = [user, {"role": "assistant", "reasoning_content": "\nwhy\n", "content": "a"}]
    assert render(tokenizer, reasoned) == head + "<think>\nwhy\n</think>\n\na<|im_end|>\n"
    plain = [user, {"role": "assistant", "content": "a"}]
    assert render(tokenizer, plain) == head + "<think>\n\n</think>\n\na<|im_end|>\n"


def test_unknown_role_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="unknown role wizard"):
        render(tokenizer, [{"role": "wizard", "content": "hi"}])


def test_the_tasks_texts_need_few_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    lengths = [len(tokenizer(task.write_trace(question)).input_ids) for question in task.unseen_questions(200)]
    assert 60 < sum(lengths) / 200 < 250
