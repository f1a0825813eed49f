"""ThinkingProbe: from a hidden state to how likely the answer would be right if thinking ended there; and its fit.

A small network on what lm_head is given, at the ends of sentences, as in Zhang et al., arXiv 2504.05419. It is read by
`ProbeRule` and costs a decode step two small products.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwenopt.errors import QwenoptError

WIDTH = 32
MIN_OF_EACH = 8  # examples that are right, and that are wrong, below which nothing can be learned
_STEPS, _CHECK_EVERY, _LEARNING_RATE, _WEIGHT_DECAY = 600, 10, 3e-3, 1e-2


class ThinkingProbe(nn.Module):
    """`probe(hidden [R, N]) -> score float32 [R]` from 0 to 1; hidden of any floating dtype."""

    def __init__(self, hidden_size: int, width: int = WIDTH) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, width)
        self.outer = nn.Linear(width, 1)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        return torch.sigmoid(self.logits(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """The score before the sigmoid, float32 [R]."""
        return self.outer(torch.relu(self.inner(hidden.float()))).reshape(-1)  # type: ignore[no-any-return]

    def save(self, path: str | Path) -> None:
        """Write the weights as safetensors."""
        from safetensors.torch import save_file

        save_file({name: t.contiguous() for name, t in self.state_dict().items()}, path, {"format": "pt"})

    @classmethod
    def load(cls, path: str | Path) -> ThinkingProbe:
        """What `save` wrote. Raises QwenoptError where the file is not that of a probe."""
        from safetensors.torch import load_file

        try:
            weights = load_file(path)
            width, hidden_size = weights["inner.weight"].shape
            probe = cls(hidden_size, width)
            probe.load_state_dict(weights)
        except Exception as error:  # safetensors, a missing file, a missing weight and a wrong shape each raise another
            raise QwenoptError(
                f"{path} is no probe: {error}; needed: a file that ThinkingProbe.save or `qwenopt calibrate` wrote"
            ) from error
        return probe


@dataclass(frozen=True)
class ProbeFit:
    """How a probe came out, by examples of questions that it was not fitted to.

    questions, examples: of both parts; held_out_examples: those of the questions left out. right: the share of
    examples whose answer was right. auc: the probability that a right one is scored above a wrong one. accuracy: by a
    threshold of 0.5. loss: binary cross entropy in nats.
    """

    questions: int
    examples: int
    held_out_examples: int
    right: float
    auc: float
    accuracy: float
    loss: float


def fit_probe(
    hidden: Tensor,
    right: Tensor,
    question: Tensor,
    *,
    width: int = WIDTH,
    held_out: float = 0.2,
    seed: int = 0,
) -> tuple[ThinkingProbe, ProbeFit]:
    """Fit a probe to hidden states [X, N] with labels right (bool [X]) of questions (int64 [X]).

    A share `held_out` of the questions is set aside, whole, so that no question is on both sides; the step at which the
    loss on them was lowest is kept. The same input and seed give the same probe, and the global random state is left
    alone. Raises QwenoptError where either part has too few right or too few wrong examples.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, right, question = hidden.detach().float().cpu(), right.cpu(), question.cpu()
    numbers = question.unique()
    numbers = numbers[torch.randperm(len(numbers), generator=generator)]
    aside = torch.isin(question, numbers[: max(1, round(len(numbers) * held_out))])
    for part, chosen in (("fitted to", right[~aside]), ("held out", right[aside])):
        _check_labels(part, chosen, len(numbers))
    mean, scale = hidden[~aside].mean(0), hidden[~aside].std(0).clamp(min=1e-6)
    probe = _descend((hidden - mean) / scale, right.float(), aside, width, generator)
    # The scaling becomes part of the first layer.
    probe.inner.bias.sub_(probe.inner.weight @ (mean / scale))
    probe.inner.weight.div_(scale)
    with torch.no_grad():
        logits, labels = probe.logits(hidden[aside]), right[aside]
    fit = ProbeFit(
        questions=len(numbers),
        examples=len(right),
        held_out_examples=int(aside.sum()),
        right=float(right.float().mean()),
        auc=area(logits, labels),
        accuracy=float(((logits > 0) == labels).float().mean()),
        loss=float(F.binary_cross_entropy_with_logits(logits, labels.float())),
    )
    return probe, fit


def _check_labels(part: str, right: Tensor, questions: int) -> None:
    good = int(right.sum())
    bad = len(right) - good
    if min(good, bad) < MIN_OF_EACH:
        raise QwenoptError(
            f"fit_probe: {good} right and {bad} wrong examples {part}, of {questions} questions in all; it needs "
            f"{MIN_OF_EACH} of each: give more questions, or such as the model answers neither always nor never"
        )


def _descend(inputs: Tensor, labels: Tensor, aside: Tensor, width: int, generator: torch.Generator) -> ThinkingProbe:
    """Full-batch AdamW on the rows outside `aside`; returns the weights that were best on those inside."""
    probe = ThinkingProbe(inputs.shape[1], width)
    for layer in (probe.inner, probe.outer):
        bound = layer.in_features**-0.5
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.zero_()
    best, best_loss = {k: v.clone() for k, v in probe.state_dict().items()}, float("inf")
    with torch.enable_grad():
        probe.requires_grad_(True)
        optimiser = torch.optim.AdamW(probe.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        for step in range(_STEPS):
            if step % _CHECK_EVERY == 0:
                with torch.no_grad():
                    loss = F.binary_cross_entropy_with_logits(probe.logits(inputs[aside]), labels[aside])
                if float(loss) < best_loss:
                    best, best_loss = {k: v.clone() for k, v in probe.state_dict().items()}, float(loss)
            optimiser.zero_grad()
            F.binary_cross_entropy_with_logits(probe.logits(inputs[~aside]), labels[~aside]).backward()
            optimiser.step()
    probe.requires_grad_(False)
    probe.load_state_dict(best)
    return probe


def area(scores: Tensor, right: Tensor) -> float:
    """The area under the ROC curve of scores [X] for labels right (bool [X]); ties count half."""
    good, bad = scores[right], scores[~right].sort().values
    below = torch.searchsorted(bad, good, right=False) + torch.searchsorted(bad, good, right=True)
    return float(below.double().mean()) / (2 * len(bad))
