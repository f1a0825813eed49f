"""Bench: a model, questions, and a generation of all of them under one thinking configuration after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwenopt.cli import checkpoint, curves, stream
from qwenopt.cli.questions import Question

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qwenopt.runtime.paged_cache import PagedKVCache
    from qwenopt.runtime.thinking_exits import ExitBoundary
    from qwenopt.runtime.thinking_probe import ProbeFit, ThinkingProbe

PAGE, ANSWER_TOKENS = 32, 64
SLACK = 3  # tokens by which a whole character may put off a cut


class Bench:
    """One paged cache serves all generations, so prompts are read once and the steps are compiled once for each kind of
    tail.

    measured: the questions of every point; fitted: those of the probe. temperature None is the generation config's, 0
    is greedy; sampling is seeded. Raises QwenoptError where the cache does not fit into memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        measured: Sequence[Question],
        fitted: Sequence[Question],
        *,
        max_new_tokens: int,
        batch: int,
        temperature: float | None,
        seed: int,
    ) -> None:
        from qwenopt.runtime.thinking_tokens import ThinkingTokens

        self.model, self.tokenizer, self.measured, self.fitted = model, tokenizer, measured, fitted
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.prompts, self.fit_prompts = (
            [stream.prompt_ids(tokenizer, question.text, True) for question in some] for some in (measured, fitted)
        )
        self.stop_ids = frozenset(stream.stop_ids(model))
        size = model.config.vocab_size
        self.tokens = ThinkingTokens.of(tokenizer, vocab_size=size, eos_token_id=sorted(self.stop_ids))
        self.sampling: dict[str, Any] = {"temperature": temperature}
        if temperature != 0:
            self.sampling["seed"] = seed
        self.cache = self._make_cache(batch)
        self.probe: ThinkingProbe | None = None

    def _make_cache(self, batch: int) -> PagedKVCache:
        from qwenopt.runtime.paged_cache import PagedKVCache
        from qwenopt.runtime.thinking_labels import CLOSING

        longest = max(len(prompt) for prompt in (*self.prompts, *self.fit_prompts))
        pages = -(-(longest + self.max_new_tokens + ANSWER_TOKENS + CLOSING) // PAGE)
        config = self.model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * dim * self.model.dtype.itemsize
        what = f"a cache for {batch} replies of {self.max_new_tokens} tokens (--batch, --max-new-tokens)"
        checkpoint.check_memory(batch * pages * PAGE * token_bytes, what)
        return PagedKVCache(
            config,
            max_batch_size=batch,
            num_pages=batch * pages,
            page_size=PAGE,
            dtype=self.model.dtype,
            device=self.model.device,
            max_length=pages * PAGE,
        )

    def measure(self, setting: curves.Setting) -> curves.Point:
        """Answer all questions under a setting; it may hold a ProbeRule once there is a probe."""
        import qwenopt

        def generate(config: Any) -> Any:
            return qwenopt.generate(
                self.model,
                self.prompts,
                max_new_tokens=self.max_new_tokens,
                thinking=config,
                tokenizer=self.tokens,
                probe=self.probe,
                cache=self.cache,
                **self.sampling,
            )

        return curves.measure(setting, generate, lambda i, ids: self._is_right(self.measured[i], ids), self.stop_ids)

    def fit_probe(self, boundary: ExitBoundary) -> ProbeFit:
        """Make the probe, from the questions to fit it to."""
        from qwenopt.runtime.thinking_labels import label_boundaries
        from qwenopt.runtime.thinking_probe import fit_probe

        examples = label_boundaries(
            self.model,
            self.fit_prompts,
            lambda i, ids: self._is_right(self.fitted[i], ids),
            self.tokens,
            max_new_tokens=self.max_new_tokens,
            answer_tokens=ANSWER_TOKENS,
            boundary=boundary,
            cache=self.cache,
            **self.sampling,
        )
        probe, fit = fit_probe(examples.hidden, examples.right, examples.question, seed=self.seed)
        self.probe = probe.to(self.model.device)
        return fit

    def _is_right(self, question: Question, ids: list[int]) -> bool:
        ids = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        return question.is_right(self.tokenizer.decode(ids, skip_special_tokens=False))
