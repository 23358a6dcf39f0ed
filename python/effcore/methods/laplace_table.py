"""Predictions for many prior variances from one pass over the data, and the choice that held-out labels make among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

JITTER = 1e-6  # added to the covariance of logits
TEMPERATURES = [2 ** (i / 2) for i in range(-2, 7)]  # half an octave each


class Choice(NamedTuple):
    variances: tuple[int, ...]  # each layer's place in the table's variances
    temperature: float


@dataclass
class PriorTable:
    """Logits of N examples around the MAP, and the covariance that each layer adds to them, for each of S prior variances.

    Attributes:
        variances: [S].
        mean: [N, C].
        covariances: [layers, S, N, C, C].
        labels: int64 [N].
    """

    variances: Tensor
    mean: Tensor
    covariances: Tensor
    labels: Tensor

    def probabilities(self, choice: Choice, *, samples: int = 1000, seed: int = 0) -> Tensor:
        """[N, C]: the mean of the softmax over draws of the logits, N(f / T, Σ / T²)."""
        covariance = torch.stack([self.covariances[i, s] for i, s in enumerate(choice.variances)]).sum(0)
        return sampled(self.mean / choice.temperature, covariance / choice.temperature**2, samples, seed)

    def choose(self, *, per_layer: bool = False, temperature: bool = False) -> Choice:
        """The least NLL of the labels: of one variance for all layers; then of one a layer, by coordinate descent. With a
        temperature, all pairs of it and a shared variance are tried (where one is too small the other makes up for it, so that
        the best of each in turn would hardly move), and it is refined at the end."""
        layers, candidates = len(self.covariances), range(len(self.variances))

        def loss(choice: Choice) -> float:
            p = self.probabilities(choice, samples=256)
            return float(-p.gather(1, self.labels[:, None]).clamp_min(1e-12).log().mean())

        shared = (Choice((s,) * layers, t) for s in candidates for t in (TEMPERATURES if temperature else [1.0]))
        best = min(shared, key=loss)
        for _ in range(2 if per_layer else 0):
            for i in range(layers):
                before, after = best.variances[:i], best.variances[i + 1 :]
                best = min((Choice((*before, s, *after), best.temperature) for s in candidates), key=loss)
        if temperature:
            middle, step = math.log(best.temperature), math.log(2) / 2
            found = minimum(
                lambda t: loss(Choice(best.variances, math.exp(t))), middle - step, middle + step, points=5, width=1e-3
            )
            best = Choice(best.variances, math.exp(found))
        return best


def sampled(mean: Tensor, covariance: Tensor, samples: int, seed: int) -> Tensor:
    """The mean of the softmax, not the softmax of the mean."""
    generator = torch.Generator().manual_seed(seed)
    wide, identity = covariance.double(), torch.eye(mean.shape[1], dtype=torch.float64, device=mean.device)
    root = torch.linalg.cholesky(
        (wide + wide.mT) / 2 + JITTER * identity * (1 + wide.diagonal(dim1=1, dim2=2).amax(1)[:, None, None])
    )
    noise = torch.randn(samples, mean.shape[1], generator=generator, dtype=torch.float64).to(mean.device)
    total = torch.zeros_like(mean, dtype=torch.float64)
    for some in noise.split(128):
        total += (mean.double() + torch.einsum("bcd,sd->sbc", root, some)).softmax(-1).sum(0)
    return (total / samples).to(mean.dtype)


def minimum(loss: Callable[[float], float], low: float, high: float, *, points: int = 49, width: float = 1e-6) -> float:
    """Of a function with one valley in most cases: a grid first, golden sections in the best cell's neighbourhood then."""
    grid: Sequence[float] = torch.linspace(low, high, points, dtype=torch.float64).tolist()
    values = [loss(x) for x in grid]
    best = values.index(min(values))
    a, b = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    ratio = (math.sqrt(5) - 1) / 2
    while b - a > width:
        c, d = b - ratio * (b - a), a + ratio * (b - a)
        a, b = (a, d) if loss(c) < loss(d) else (c, b)
    return (a + b) / 2
