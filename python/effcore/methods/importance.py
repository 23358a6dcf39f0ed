r"""Which samples to train on, given how much the model's answers to them changed: the arithmetic of SwiftLearn.

With P_i the recorded outputs of sample i (logits; token log-probabilities for a language model) and s the recording:

    importance_i = ‖P_i^s − P_i^{s−1}‖²,    Pr_i = softmax(σ · z)_i,    z = (importance − mean) / standard deviation

The paper (arXiv 2311.15134) takes the softmax of σ · importance; standardising is ours: σ then means the same on every task.
Drawing without replacement with probabilities Pr is one top-k: the k largest of σ·z_i + G_i, G_i standard Gumbel noise
(arXiv 1903.06059). Ten million samples cost about 0.9 s of one processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SELECTIONS = ("gumbel", "topk", "random")
_BLOCKS, _BLOCK_LEAST = 64, 256  # of samples recorded at about the same time, and the fewest in each


@dataclass(frozen=True)
class Standard:
    """Mean and deviation of the importances that are known, and log Σ exp(σ·z) over all samples."""

    mean: float
    deviation: float
    log_total: float

    @classmethod
    def of(cls, importance: Tensor, sigma: float) -> Standard:
        """``importance``: float32 [N]; NaN where a sample was not measured, which counts as the mean."""
        known = importance[~importance.isnan()]
        if not known.numel():
            return cls(0.0, 0.0, float(torch.tensor(float(len(importance))).log()))
        deviation, mean = torch.std_mean(known, correction=0)
        plain = cls(mean.item(), deviation.item(), 0.0)
        return cls(plain.mean, plain.deviation, torch.logsumexp(sigma * plain.scores(importance), 0).item())

    @property
    def is_constant(self) -> bool:
        """All importances are equal (to rounding), so they prefer no sample."""
        return self.deviation <= 1e-6 * abs(self.mean)

    def scores(self, importance: Tensor) -> Tensor:
        """z, float32 [N]; 0 where nothing is known."""
        if self.is_constant:
            return torch.zeros_like(importance)
        return ((importance - self.mean) / self.deviation).nan_to_num_(nan=0.0)


def draw(importance: Tensor, count: int, *, select: str, sigma: float, generator: torch.Generator) -> Tensor:
    """``count`` different sample numbers in random order, int64.

    Args:
        importance: float32 [N], NaN where unknown.
        select: ``gumbel`` draws with probabilities Pr; ``topk`` takes the most important, ties at random; ``random`` ignores
            the importances.
    """
    if select not in SELECTIONS:
        raise ValueError(f"effcore.draw: select must be one of {', '.join(SELECTIONS)}, got {select!r}")
    samples = len(importance)
    if not 0 < count <= samples:
        raise ValueError(f"effcore.draw: count must be from 1 to {samples} samples, got {count}")
    if count == samples:
        return torch.randperm(samples, generator=generator)
    if select == "topk":
        chosen = _most_important(Standard.of(importance, sigma).scores(importance), count, generator)
    else:
        keys = torch.empty(samples).exponential_(generator=generator).log_().neg_()
        if select == "gumbel":
            keys.add_(Standard.of(importance, sigma).scores(importance), alpha=sigma)
        chosen = keys.topk(count, sorted=False).indices
    return chosen[torch.randperm(count, generator=generator)]


def _most_important(scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
    threshold = scores.topk(count, sorted=False).values.min()
    above = (scores > threshold).nonzero().flatten()
    ties = (scores == threshold).nonzero().flatten()
    among = torch.randperm(len(ties), generator=generator)[: count - len(above)]
    return torch.cat([above, ties[among]])


def squared_change(new: Tensor, old: Tensor, counts: Tensor | None = None) -> Tensor:
    """‖new − old‖² a row, float32 [B], of values [B, W]; divided by ``counts`` [B] (tokens) where given."""
    change = (new - old).square().sum(1)
    return change if counts is None else change / counts.clamp(min=1)


def detrended(change: Tensor, places: Sequence[Tensor]) -> Tensor:
    """Changes relative to those of the samples that were recorded at about the same times, with the same mean as before.

    A run's outputs move fast at first and slowly later. So a sample that is visited early in one warm-up epoch and late in
    the next has moved far, whatever it is. What is left is the sample's own.

    Args:
        change: float32 [N], NaN where unknown.
        places: int64 [N] each: where a sample stands in the order of each of the two epochs.
    """
    blocks = min(_BLOCKS, len(change) // _BLOCK_LEAST)
    if blocks < 2:
        return change
    known = ~change.isnan()
    found = change.clone()
    for place in places:
        block = place * blocks // len(change)
        values, at = found[known], block[known]
        total = torch.zeros(blocks).index_add_(0, at, values)
        count = torch.bincount(at, minlength=blocks).clamp(min=1)
        usual = total / count
        # A block that nobody moved in tells nothing.
        factor = torch.where(usual > 0, values.mean() / usual, 1.0)
        found *= factor[block]
    return found


def token_log_probs(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """What is recorded of a language model: log p(label) of each token, and how many tokens count.

    Two recordings of a sample are compared place by place, so rows are to be padded on the right, or always to one length.

    Args:
        logits: [B, S, vocabulary]. Position t predicts label t+1.
        labels: int64 [B, S].

    Returns:
        values float32 [B, S−1], 0 where the label is ``ignore_index``; counts int64 [B].
    """
    targets = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction="none"
    )
    return -losses.view(targets.shape), (targets != ignore_index).sum(1)
