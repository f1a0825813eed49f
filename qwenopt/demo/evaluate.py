"""Measures a demo model on unseen questions: ``python -m qwenopt.demo.evaluate dense``.

Greedy decoding in batches with plain transformers in eager mode: left padding and a ``DynamicCache``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from qwenopt.demo import task
from qwenopt.demo.load import DEMO_NAMES, demo_model, load_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The longest trace (7 steps, 4 checks) has 355 tokens; the answer 8.
MAX_NEW_TOKENS = 400
ANSWER_TOKENS = 16


class RoomyLayer(DynamicLayer):
    """A ``DynamicLayer`` with spare room: a decode step writes its token instead of copying all earlier ones.

    That copy, with its fresh memory each time, took three quarters of a decode step on the CPU.
    """

    GROWTH = 128  # positions

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the [batch, heads, new, head size] states; return all keys and values so far."""
        seen = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.rooms = [key_states[:, :, :0], value_states[:, :, :0]]
        end = seen + key_states.shape[-2]
        if end > self.rooms[0].shape[-2]:
            self.rooms = [self._enlarged(room, end + self.GROWTH) for room in self.rooms]
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, seen:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self.rooms)
        return self.keys, self.values

    @staticmethod
    def _enlarged(room: torch.Tensor, length: int) -> torch.Tensor:
        """Copy ``room`` [batch, heads, positions, head size] into one of ``length`` positions."""
        larger = room.new_zeros(*room.shape[:2], length, room.shape[3])
        larger[:, :, : room.shape[2]] = room
        return larger


class Evaluation(NamedTuple):
    """``accuracy`` from 0 to 1, and the mean number of tokens between ``<think>`` and ``</think>``.

    Under a budget the stop sentence lies between the two as well and is counted.
    """

    accuracy: float
    mean_thinking_tokens: float


@torch.inference_mode()
def greedy(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, stop_ids: set[int], pad_id: int
) -> list[list[int]]:
    """Continue every prompt greedily, as one left-padded batch.

    Args:
        prompts: token ids, one list of any length a row.
        max_new_tokens: most tokens to add to a row.
        stop_ids: a row ends after the first of these, which it keeps.

    Returns:
        The new token ids of each row.
    """
    new: list[list[int]] = [[] for _ in prompts]
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() for _ in cache.layers]
    running = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        )
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        chosen = ids[:, 0].tolist()
        for row in list(running):
            new[row].append(chosen[row])
            if chosen[row] in stop_ids:
                running.discard(row)
        if not running:
            break
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return new


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: task.Question, thinking: bool) -> list[int]:
    """Return the token ids of the chat prompt for one question."""
    messages = [{"role": "user", "content": question.text}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def reply_with_budget(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], budget: int
) -> list[list[int]]:
    """Answer thinking prompts with at most ``budget`` thinking tokens, as new token ids a row.

    Two passes: up to ``budget`` tokens after ``<think>\\n``; then, where the trace has not ended by
    itself, Qwen's stop sentence closes it, and the answer is generated.
    """
    close, end = (tokenizer.convert_tokens_to_ids(token) for token in ("</think>", "<|im_end|>"))
    opening = tokenizer("<think>\n")["input_ids"]
    stop = tokenizer(task.STOP_SENTENCE)["input_ids"]
    started = [prompt + opening for prompt in prompts]
    traces = greedy(model, started, budget, {close}, tokenizer.pad_token_id)
    closed = [trace if trace and trace[-1] == close else trace + stop for trace in traces]
    second = [prompt + trace for prompt, trace in zip(started, closed, strict=True)]
    answers = greedy(model, second, ANSWER_TOKENS, {end}, tokenizer.pad_token_id)
    return [opening + trace + answer for trace, answer in zip(closed, answers, strict=True)]


def thinking_tokens(tokenizer: PreTrainedTokenizerBase, reply: list[int]) -> int:
    """Count the tokens between ``<think>`` and ``</think>`` (or the end) in a reply's token ids."""
    start, close = (tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "</think>"))
    if start not in reply:
        return 0
    end = reply.index(close) if close in reply else len(reply)
    return end - reply.index(start) - 1


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    thinking: bool,
    num_questions: int = 500,
    budget: int | None = None,
    batch_size: int = 50,
    seed: int = 2026,
) -> Evaluation:
    """Answer unseen questions greedily.

    Args:
        thinking: with the model's own trace, or with an empty think block.
        num_questions: how many questions of the test split, always the same ones for a seed.
        budget: close the trace by force after this many tokens; ``None`` lets it end by itself.
        batch_size: rows decoded together; bounds the cache's memory.
    """
    if num_questions < 1:
        raise ValueError(f"num_questions is {num_questions}: it must be at least 1")
    if budget is not None and (budget < 0 or not thinking):
        raise ValueError(f"budget is {budget} with thinking={thinking}: it must be >= 0 and needs thinking=True")
    questions = task.unseen_questions(num_questions, seed)
    # Rows that end together share a batch: no row is decoded on while it waits for a longer one.
    questions.sort(key=lambda question: len(task.write_trace(question)))
    end_ids = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.pad_token_id}
    correct = tokens = 0
    for first in range(0, num_questions, batch_size):
        group = questions[first : first + batch_size]
        prompts = [prompt_ids(tokenizer, question, thinking) for question in group]
        if budget is not None:
            replies = reply_with_budget(model, tokenizer, prompts, budget)
        else:
            limit = MAX_NEW_TOKENS if thinking else ANSWER_TOKENS
            replies = greedy(model, prompts, limit, end_ids, tokenizer.pad_token_id)
        tokens += sum(thinking_tokens(tokenizer, reply) for reply in replies)
        correct += sum(
            task.is_correct(question, tokenizer.decode(reply)) for question, reply in zip(group, replies, strict=True)
        )
    return Evaluation(correct / num_questions, tokens / num_questions)


def main() -> None:
    """Command line: print the accuracies of one model, or its accuracies at thinking budgets."""
    parser = argparse.ArgumentParser(description="Evaluate a qwenopt demo model on unseen questions.")
    parser.add_argument("name", choices=DEMO_NAMES)
    parser.add_argument("--path", type=Path, help="checkpoint folder (default: the shipped one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--budget", type=int, nargs="+", help="force-close the trace after so many tokens")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    model, tokenizer = load_checkpoint(args.path, dtype) if args.path else demo_model(args.name, dtype)
    runs = [(f"budget {n}", True, n) for n in args.budget or []] or [("thinking", True, None), ("direct", False, None)]
    for label, thinking, budget in runs:
        started = time.monotonic()
        result = accuracy(model, tokenizer, thinking, args.questions, budget)
        print(
            f"{args.name} {args.dtype} {label}: accuracy {result.accuracy:.3f}, "
            f"mean thinking tokens {result.mean_thinking_tokens:.1f}, {time.monotonic() - started:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
