"""Builds the demo models' tokenizer: Qwen's byte-level BPE and special tokens, with a small vocabulary."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

from qwenopt.demo import task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TEXT_TOKENS: tuple[str, ...] = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip

# Bytes, merges and the 26 added tokens make 496 entries; the models pad that to 512 rows, as Qwen3 pads its own.
NUM_BYTES = 256
NUM_MERGES = 214
PADDED_VOCAB_SIZE = 512
MAX_LENGTH = 4096

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

GENERIC_ENGLISH = """\
The quick answer is not always the right one, so it is worth taking a moment to think about the question.
I think that this is how we can do it. First, we need to know what they are asking for, and then we work it out.
If there is something that you do not understand, please say so and I will try to explain it in another way.
There were many people in the house when she came back from the city, but none of them had seen the letter.
However, because of the time that it would take, he would rather have gone with his friends to the other place.
This function returns the number of tokens in the list, or nothing when the list is empty.
"""

CHAT_TEMPLATE = """\
{%- set last = namespace(user=-1) %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' ~ message.role ~ ': it must be system, user or assistant') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {%- set last.user = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set thinking = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thinking = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thinking = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > last.user and (loop.last or thinking) %}
            {{- '<think>\\n' + thinking.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
    {%- else %}
        {{- content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def corpus(seed: int = 0, num_questions: int = 400) -> list[str]:
    """Return the texts the merges are learned from: the task's own, and some generic English."""
    rng = random.Random(seed)
    texts: list[str] = []
    for _ in range(num_questions):
        question = task.make_question(rng, "train")
        texts += [question.text, task.write_trace(question), task.write_answer(question)]
    framing = [task.STOP_SENTENCE.split("</think>")[0], *task.SYSTEM_PROMPTS, "user\n", "assistant\n"]
    # Blank lines stand next to special tokens in the chat format, where no other text shows them.
    return texts + framing * 100 + ["\n\n"] * 1000 + [GENERIC_ENGLISH] * 40


def learn_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train the byte-level BPE; return the vocabulary (token to id) and the merges in order."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_BYTES + NUM_MERGES,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    state = json.loads(bpe.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


def build_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer, with 496 entries and Qwen3's chat behaviour."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    vocab, merges = learn_merges()
    if len(vocab) != NUM_BYTES + NUM_MERGES:
        raise RuntimeError(f"the corpus gave {len(vocab)} tokens: {NUM_BYTES + NUM_MERGES} are needed")
    # The class would add its eos and pad tokens first; added here they keep Qwen3's order.
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, unk_token=None, bos_token=None, eos_token=None, pad_token=None, padding_side="left"
    )
    control = [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
    tokenizer.add_tokens(control, special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TEXT_TOKENS])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = MAX_LENGTH
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
