"""Sampling as a module of static buffers: one row per slot of the batch, no host reads, one graph for all settings.

A row's random numbers are a hash of its seed and of the number of tokens it has drawn, so its tokens depend neither on
its place in the batch nor on the other rows. One uniform is drawn per row and step, greedy and forced rows included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwenopt.ops.op import call
from qwenopt.ops.top_tokens import TOP_TOKENS

# Columns of Sampler.settings.
TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(7)
LOW32 = 0xFFFFFFFF


@dataclass(frozen=True)
class SamplingParams:
    """How one row is sampled; the filters are applied in this order, as in transformers.

    temperature: 0 is greedy. top_k: keep the k most likely (0: all). top_p: keep the fewest most likely tokens whose
    probabilities reach it, over what top_k kept. min_p: drop what is less likely than `min_p` times the likeliest.
    repetition_penalty divides positive and multiplies negative logits of every token of prompt and output;
    presence_penalty is subtracted once, and frequency_penalty once per occurrence, from the tokens of the output.
    seed: 0 <= seed < 2**64; None draws one from torch's default generator when the row is set.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, math.inf)
        _integer("top_k", self.top_k, 0, 1 << 24)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, 0, (1 << 64) - 1)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether tokens that were already there change the logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @classmethod
    def qwen3(cls, *, thinking: bool = True, **changes: Any) -> SamplingParams:
        """What Qwen3's model card recommends, for thinking or non-thinking mode."""
        best = {"temperature": 0.6, "top_p": 0.95} if thinking else {"temperature": 0.7, "top_p": 0.8}
        return cls(**{"top_k": 20, "min_p": 0.0, **best, **changes})


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"SamplingParams: {name} {value!r} is {type(value).__name__}; it must be an int")
    if not low <= value <= high:
        raise ValueError(f"SamplingParams: {name} {value}; it must be {low}..{high}")


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"SamplingParams: {name} {value!r} is {type(value).__name__}; it must be a number")
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside or math.isinf(value):
        bounds = f"more than {low:g}" if open_low else f"at least {low:g}"
        bounds += "" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"SamplingParams: {name} {value}; it must be {bounds}")


GREEDY = SamplingParams(temperature=0.0)


class Sampler(nn.Module):
    """`sampler(logits [R, V]) -> ids int64 [R]`, each row by its own SamplingParams; traceable in one graph.

    What the graph can do is fixed when the sampler is made, and `set_row` refuses what it cannot:

    * `greedy=True`: the likeliest token and nothing else, the fastest;
    * `max_top_k=64`: rows keep at most that many candidates; None sorts the whole vocabulary, which
      `top_k=0` needs;
    * `vocab_size=V` makes room for penalties: what each row has seen, 5 bytes per row and token of the vocabulary.

    All rows start greedy. Rows may be changed between steps; nothing is compiled anew.
    """

    def __init__(
        self,
        rows: int,
        *,
        greedy: bool = False,
        max_top_k: int | None = 64,
        vocab_size: int | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        if rows < 1:
            raise ValueError(f"Sampler: {rows} rows; it needs at least 1")
        if max_top_k is not None and max_top_k < 1:
            raise ValueError(f"Sampler: max_top_k {max_top_k}; it must be at least 1, or None for the whole vocabulary")
        self.rows, self.greedy, self.max_top_k = rows, greedy, max_top_k
        neutral = torch.tensor([0.0, 0, 1, 0, 1, 0, 0], device=device)
        # [thinking, answer][row][setting]
        self.register_buffer("settings", neutral.repeat(2, rows, 1), persistent=False)
        self.register_buffer("keys", torch.zeros(rows, 2, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("steps", torch.zeros(rows, dtype=torch.int64, device=device), persistent=False)
        self.penalties = vocab_size is not None
        size = (rows, vocab_size or 0)
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int32, device=device), persistent=False)
        self.register_buffer("prompt", torch.zeros(size, dtype=torch.bool, device=device), persistent=False)

    settings: Tensor
    keys: Tensor
    steps: Tensor
    counts: Tensor
    prompt: Tensor

    @property
    def reads_settings(self) -> bool:
        """Whether rows have settings at all; where not, each takes its likeliest token."""
        return not self.greedy or self.penalties

    @classmethod
    def fitting(
        cls, params: Sequence[SamplingParams], vocab_size: int, device: Any = None, *, rows: int | None = None
    ) -> Sampler:
        """A lean sampler that can serve these settings: one row for each, already set, or `rows` greedy ones.

        Its max_top_k is a power of two, so that settings of all kinds have few graphs.
        """
        drawn = [p.top_k for p in params if not p.greedy]
        top = 1 << (max(drawn, default=1) - 1).bit_length() if 0 not in drawn else 0
        penalties = any(p.penalises for p in params)
        sampler = cls(
            rows or len(params),
            greedy=all(p.greedy for p in params) and not penalties,
            max_top_k=top if 1 <= top <= 1024 else None,  # 0 is the whole vocabulary, however small
            vocab_size=vocab_size if penalties else None,
            device=device,
        )
        for row, one in enumerate(params if rows is None else ()):
            sampler.set_row(row, one)
        return sampler

    def set_row(
        self,
        row: int,
        params: SamplingParams,
        *,
        answer: SamplingParams | None = None,
        prompt_ids: Iterable[int] = (),
        steps: int = 0,
    ) -> None:
        """Give `row` new settings and start its random numbers anew, `steps` tokens into its stream.

        `answer` holds for the rows that `forward` is told are answering (default: as `params`; its seed is not used).
        `prompt_ids` are what a repetition penalty sees besides the output.
        """
        if not 0 <= row < self.rows:
            raise IndexError(f"Sampler: row {row}; there are rows 0..{self.rows - 1}")
        both = (params, params if answer is None else answer)
        for one in both:
            self._need(one)
        values = [
            (p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
            for p in both
        ]
        self.settings[:, row] = torch.tensor(values, dtype=torch.float32, device=self.settings.device)
        seed = int(torch.randint(1 << 62, ())) if params.seed is None else params.seed
        self.keys[row] = torch.tensor(_keys(seed), device=self.keys.device)
        self.steps[row] = steps
        if self.penalties:
            self.counts[row], self.prompt[row] = 0, False
            seen = torch.tensor(list(prompt_ids), dtype=torch.int64, device=self.prompt.device)
            self.prompt[row, seen] = True

    def _need(self, params: SamplingParams) -> None:
        if params.penalises and not self.penalties:
            raise ValueError(f"Sampler: {params} has a penalty; make the sampler with vocab_size=...")
        if params.greedy:
            return
        if self.greedy:
            raise ValueError(f"Sampler: {params} is not greedy; make the sampler without greedy=True")
        if self.max_top_k is not None and not 1 <= params.top_k <= self.max_top_k:
            raise ValueError(
                f"Sampler: top_k {params.top_k} (0: the whole vocabulary) of a sampler for 1..{self.max_top_k}; "
                f"make the sampler with max_top_k={params.top_k or None}"
            )

    def permute_rows(self, order: Tensor) -> None:
        """Row i becomes what row `order[i]` was; int64 [R]."""
        for buffer in (self.keys, self.steps, self.counts, self.prompt):
            buffer.copy_(buffer[order])
        self.settings.copy_(self.settings[:, order])

    def observe(self, ids: Tensor, active: Tensor | None = None) -> None:
        """Note the tokens that were really emitted, int64 [R]: what penalties count. Nothing without penalties."""
        if self.penalties:
            one = torch.ones_like(ids, dtype=torch.int32) if active is None else active.to(torch.int32)
            self.counts.scatter_add_(1, ids[:, None], one[:, None])

    def forward(self, logits: Tensor, answering: Tensor | None = None, active: Tensor | None = None) -> Tensor:
        """Draw a token per row. logits [R, V] of any floating dtype; answering bool [R] picks the row's settings.

        active bool [R]: rows whose random numbers go on; what the others get means nothing (default: all).
        """
        if not self.reads_settings:
            return _best(logits)
        first, second = self.settings[0], self.settings[1]
        settings = first if answering is None else torch.where(answering[:, None], second, first)
        if self.penalties:
            logits = self._penalised(logits.float(), settings)
        if self.greedy:
            return _best(logits)
        size = logits.shape[-1] if self.max_top_k is None else min(self.max_top_k, logits.shape[-1])
        values, ids = call(TOP_TOKENS, logits, size)
        chosen = ids.gather(1, _choose(values.float(), settings, self._uniform(active))).squeeze(1)
        return torch.where(settings[:, TEMPERATURE] == 0, ids[:, 0], chosen)

    def _penalised(self, logits: Tensor, settings: Tensor) -> Tensor:
        factor, presence, frequency = (settings[:, i, None] for i in (REPETITION, PRESENCE, FREQUENCY))
        counts = self.counts
        repeated = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(self.prompt | (counts > 0), repeated, logits)
        return logits - presence * (counts > 0) - frequency * counts

    def _uniform(self, active: Tensor | None) -> Tensor:
        """float64 [R] in [0, 1), the next of each row's stream."""
        counter = (self.keys[:, 0] + self.steps * 0x9E3779B9) & LOW32
        self.steps.add_(1 if active is None else active.long())
        return _mix(_mix(counter) ^ self.keys[:, 1]).double() * 2.0**-32


def _best(logits: Tensor) -> Tensor:
    """The likeliest token of each row, int64 [R]."""
    ids: Tensor = call(TOP_TOKENS, logits, 1)[1]
    return ids.squeeze(1)


def _choose(values: Tensor, settings: Tensor, uniform: Tensor) -> Tensor:
    """Places int64 [R, 1] in the descending `values` [R, K], by inverting the distribution that the filters leave."""
    temperature = settings[:, TEMPERATURE, None].double()
    scaled = values.double() / torch.where(temperature == 0, 1.0, temperature)
    place = torch.arange(values.shape[1], device=values.device)
    top_k = settings[:, TOP_K, None]
    inside = (place < top_k) | (top_k == 0)
    probs = scaled.masked_fill(~inside, -torch.inf).softmax(-1)
    # The likeliest tokens that together reach top_p: those before which less than top_p lies. The first always stays.
    before = probs.cumsum(-1) - probs
    keep = inside & (before < settings[:, TOP_P, None].double()) & (probs >= settings[:, MIN_P, None] * probs[:, :1])
    total = (probs * (keep | (place == 0))).cumsum(-1)
    # A token without probability adds nothing, so it is never the first to pass the threshold.
    return (total <= uniform[:, None] * total[:, -1:]).sum(-1, keepdim=True).clamp(max=values.shape[1] - 1)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (held in int64) that scatters them; no product leaves 63 bits."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & LOW32
    x = ((x ^ (x >> 15)) * (0x846CA68B - (1 << 32))) & LOW32  # the same number modulo 2**32, and small enough
    return x ^ (x >> 16)


def _keys(seed: int) -> tuple[int, int]:
    """Two 32-bit keys from a seed (splitmix64): seeds that differ in one bit give streams that share nothing."""
    z = (seed + 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    z ^= z >> 31
    return z & LOW32, z >> 32
