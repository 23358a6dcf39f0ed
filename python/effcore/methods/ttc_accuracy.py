r"""Accuracies with K samples a query, from n ≥ K samples of each: what a query is answered with, and how often that is right.

- ``pass``: an oracle finds a right sample, 1 − C(n−c, K)/C(n, K) with c right ones of n (arXiv 2107.03374, equation 1). It
  presumes a checker at test time.
- ``majority``: the most frequent answer, ties in equal parts.
- ``verifier``: the sample with the highest score.

All are averages over the K-subsets of the n samples, so small K use every sample: exact for ``pass`` and ``verifier``, over 64
random subsets for ``majority``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

METRICS = ("pass", "majority", "verifier")


@dataclass(frozen=True)
class Samples:
    """n samples of each of Q queries.

    Attributes:
        correct: bool [Q, n].
        answers: Q lists of n final answers, None where a sample has none; for ``majority``.
        scores: float [Q, n] of a verifier; for ``verifier``.
        tokens: generated, of all samples; what they cost.
    """

    correct: np.ndarray
    answers: Sequence[Sequence[Hashable]] | None = None
    scores: np.ndarray | None = None
    tokens: int = 0

    def __post_init__(self) -> None:
        shape = np.shape(self.correct)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"effcore.Samples: correct must be [queries, samples] and not empty, got {list(shape)}")
        if self.scores is not None and np.shape(self.scores) != shape:
            raise ValueError(f"effcore.Samples: scores are {list(np.shape(self.scores))}, correct is {list(shape)}")
        if self.scores is not None and not np.isfinite(self.scores).all():
            raise ValueError("effcore.Samples: the verifier gave scores that are not finite")
        if self.answers is not None and [len(row) for row in self.answers] != [shape[1]] * shape[0]:
            raise ValueError(f"effcore.Samples: expected {shape[0]} lists of {shape[1]} answers")

    @property
    def queries(self) -> int:
        """Q, the number of queries."""
        return len(self.correct)

    @property
    def count(self) -> int:
        """n, the samples of each query."""
        return np.shape(self.correct)[1]

    def accuracy(self, k: int, metric: str) -> float:
        """Mean over the queries. Raises ValueError where k exceeds the samples, or the metric lacks what it needs."""
        return float(self.per_query(k, metric).mean())

    def per_query(self, k: int, metric: str) -> np.ndarray:
        """Expected correctness of each query, float64 [Q]."""
        if metric not in METRICS:
            raise ValueError(f"effcore.Samples: metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if not 1 <= k <= self.count:
            raise ValueError(
                f"effcore.Samples: accuracy at {k} samples was asked for, but there are {self.count} of each query"
            )
        correct = np.asarray(self.correct, bool)
        if k == 1:
            return correct.mean(1)
        if metric == "pass":
            return 1 - _all_from(self.count - correct.sum(1), self.count, k)
        if metric == "verifier":
            if self.scores is None:
                raise ValueError("effcore.Samples: verifier accuracy needs scores")
            order = np.argsort(-self.scores, axis=1, kind="stable")
            rest = self.count - 1 - np.arange(self.count)
            best = np.array([_choose(r, k - 1) for r in rest]) / _choose(self.count, k)
            return np.take_along_axis(correct, order, 1) @ best
        if self.answers is None:
            raise ValueError("effcore.Samples: majority accuracy needs answers")
        return np.array([_majority(row, right, k) for row, right in zip(self.answers, correct, strict=True)])


def _choose(n: int | np.integer, k: int) -> float:
    from math import comb

    return float(comb(int(n), k))


def _all_from(wrong: np.ndarray, n: int, k: int) -> np.ndarray:
    """Probability that k of n, without replacement, are all wrong."""
    return np.prod([np.maximum(wrong - i, 0) / (n - i) for i in range(k)], axis=0)


def _majority(answers: Sequence[Hashable], correct: np.ndarray, k: int) -> float:
    n = len(answers)
    if k == n:
        subsets = np.arange(n)[None]
    else:
        subsets = np.random.default_rng(0).permuted(np.tile(np.arange(n), (64, 1)), axis=1)[:, :k]
    right = {answer for answer, ok in zip(answers, correct, strict=True) if ok}
    total = 0.0
    for subset in subsets:
        counts = Counter(answers[i] for i in subset if answers[i] is not None)
        most = max(counts.values(), default=0)
        winners = [answer for answer, count in counts.items() if count == most]
        total += sum(answer in right for answer in winners) / len(winners) if winners else 0.0
    return total / len(subsets)
