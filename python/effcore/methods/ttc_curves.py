r"""The two curves of TTC-aware training (arXiv 2601.01332), with confidence bounds.

    accuracy over training:   Â(B) = a·(1 − e^{−bB}) + c,  fitted to the checkpoints at or above the running maximum
    accuracy over samples:    Â_K = L / (1 + e^{−k(x − x₀)}),  x = K (the paper) or x = log₂ K (ours)

Both are linear once b, or k and x₀, are chosen. So those are tried on a grid, and the rest is solved in closed form under
0 ≤ Â ≤ 1: the best fit is found for any input, with nothing to converge. Bounds come from a parametric bootstrap: the
accuracies are drawn again from their binomial distributions and fitted again, all draws at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST_CHECKPOINTS = 4  # one more than the parameters
_DRAWS = 400


class TooFew(ValueError):
    """There are not enough points for a fit; the message says what is missing."""


@dataclass(frozen=True)
class Estimate:
    """A projected accuracy and its confidence bounds."""

    value: float
    low: float
    high: float

    def surely_reaches(self, goal: Estimate, margin: float = 0.0) -> bool:
        """Whether the lower bound of the difference of two independent estimates is at least −margin."""
        return self.value - float(np.hypot(self.value - self.low, goal.high - goal.value)) >= goal.value - margin

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


def binomial(accuracy: float, items: int, confidence: float = 0.9) -> Estimate:
    """Wilson's interval of an accuracy that was measured on so many independent items."""
    from statistics import NormalDist

    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = (accuracy + z * z / (2 * items)) / (1 + z * z / items)
    half = z / (1 + z * z / items) * (accuracy * (1 - accuracy) / items + z * z / (4 * items * items)) ** 0.5
    return Estimate(accuracy, max(middle - half, 0.0), min(middle + half, 1.0))


@dataclass(frozen=True)
class Curve:
    """A fit and its bootstrap draws: ``parameters`` [draws + 1, p], the first row being the fit to the data."""

    kind: str
    parameters: np.ndarray
    confidence: float
    residual: float  # root of the mean squared error over the fitted points

    def __call__(self, x: float) -> Estimate:
        values = _evaluate(self.kind, self.parameters, np.array([float(x)]))[:, 0]
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(values[1:], [tail, 1 - tail])
        return Estimate(float(values[0]), float(min(low, values[0])), float(max(high, values[0])))

    def values(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fit, lower and upper bound at many x, for plots."""
        rows = _evaluate(self.kind, self.parameters, np.asarray(x, float))
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(rows[1:], [tail, 1 - tail], axis=0)
        return rows[0], np.minimum(low, rows[0]), np.maximum(high, rows[0])


def on_the_envelope(accuracies: np.ndarray) -> np.ndarray:
    """Which points are at or above all before them, bool [n]."""
    return accuracies >= np.maximum.accumulate(accuracies)


def fit_training(
    budget: np.ndarray, accuracies: np.ndarray, items: int, *, confidence: float = 0.9, seed: int = 0
) -> Curve:
    """Â(B), B in any unit.

    Raises:
        TooFew: fewer than four checkpoints, or fewer than four at or above the running maximum: the accuracy does not rise.
    """
    budget, accuracies = np.asarray(budget, float), np.asarray(accuracies, float)
    if len(budget) < LEAST_CHECKPOINTS:
        plural = "" if len(budget) == 1 else "s"
        raise TooFew(f"{len(budget)} checkpoint{plural}, and a projection needs {LEAST_CHECKPOINTS}")
    used = on_the_envelope(accuracies)
    if used.sum() < LEAST_CHECKPOINTS:
        raise TooFew(
            f"{used.sum()} of {len(budget)} checkpoints are at or above all before them, and a projection needs "
            f"{LEAST_CHECKPOINTS}: the accuracy does not rise"
        )
    scale = budget[used].max()
    grids = [np.geomspace(0.02, 60, count)[:, None] / scale for count in (150, 1500)]
    return _fit("saturating", budget[used], accuracies[used], items, grids, confidence, seed)


def fit_samples(ks: np.ndarray, accuracies: np.ndarray, items: int, *, confidence: float = 0.9, seed: int = 0) -> Curve:
    """Â_K; linear or logarithmic in K, whichever predicts the largest K better from the others (linear where only three are
    given, which determine it exactly).

    Raises:
        TooFew: fewer than three K.
    """
    ks, accuracies = np.asarray(ks, float), np.asarray(accuracies, float)
    if len(ks) < 3:
        raise TooFew(f"accuracies at {len(ks)} numbers of samples, and their curve needs 3")

    def fit(kind: str, ks: np.ndarray, accuracies: np.ndarray) -> Curve:
        x = np.log2(ks) if kind == "log" else ks
        span = max(x.max() - x.min(), 1e-9)
        grids = []
        for fineness in (1, 4):
            slopes = np.geomspace(0.02, 20, 25 * fineness) / span
            far, near = -np.geomspace(0.01, 40, 12 * fineness)[::-1], np.linspace(0, 3, 25 * fineness)
            middles = x.min() + span * np.concatenate([far, near])
            grids.append(np.stack(np.meshgrid(slopes, middles, indexing="ij"), -1).reshape(-1, 2))
        return _fit(kind, ks, accuracies, items, grids, confidence, seed)

    if len(ks) == 3:
        return fit("linear", ks, accuracies)
    first = np.argsort(ks)[:-1]
    last = int(np.argmax(ks))
    missed = {
        kind: abs(fit(kind, ks[first], accuracies[first])(ks[last]).value - accuracies[last])
        for kind in ("log", "linear")
    }
    return fit(min(missed, key=missed.__getitem__), ks, accuracies)


def _basis(kind: str, shapes: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What the linear parameters multiply, [shapes, points]."""
    if kind == "saturating":
        return 1 - np.exp(-shapes * x)
    x = np.log2(x) if kind == "log" else x
    return 1 / (1 + np.exp(np.clip(-shapes[:, :1] * (x - shapes[:, 1:]), -500, 500)))


def _evaluate(kind: str, parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
    if kind == "saturating":
        a, c, b = parameters.T[:, :, None]
        return np.clip(a * _basis(kind, b, x) + c, 0, 1)
    return np.clip(parameters[:, :1] * _basis(kind, parameters[:, 1:], x), 0, 1)


def _fit(
    kind: str, x: np.ndarray, y: np.ndarray, items: int, grids: list[np.ndarray], confidence: float, seed: int
) -> Curve:
    """The best of the fine grid for the data, and of the coarse one for each bootstrap draw of it."""
    smooth = (y * items + 0.5) / (items + 1)  # no draw is without noise, not at 0 and not at 1 either
    draws = np.random.default_rng(seed).binomial(items, smooth, (_DRAWS, len(y))) / items
    weights = 1 / (smooth * (1 - smooth))
    weights = weights / weights.sum()
    coarse, fine = grids
    parameters = np.concatenate([_best(kind, x, y[None], weights, fine), _best(kind, x, draws, weights, coarse)])
    miss = _evaluate(kind, parameters[:1], x)[0] - y
    return Curve(kind, parameters, confidence, float(np.sqrt((miss**2).mean())))


def _best(kind: str, x: np.ndarray, targets: np.ndarray, weights: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Parameters [draws, p] of the least weighted squared error to targets [draws, points]."""
    basis = _basis(kind, shapes, x)
    if kind == "saturating":
        a, c = _affine(basis, targets, weights)
    else:
        a, c = _scale(basis, targets, weights), np.zeros((1, 1))
    # Σ w (a·basis + c − y)², multiplied out: [draws, shapes] without the points, and without Σ w y².
    error = a * (a * ((basis**2) @ weights) - 2 * ((targets * weights) @ basis.T))
    if kind == "saturating":
        error += c * (c + 2 * a * (basis @ weights) - 2 * (targets @ weights)[:, None])
    best = error.argmin(1)
    rows = np.arange(len(targets))
    linear = [a[rows, best]] + ([c[rows, best]] if kind == "saturating" else [])
    return np.concatenate([np.stack(linear, 1), shapes[best]], 1)


def _scale(basis: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """L of y ≈ L·basis with 0 ≤ L ≤ 1, [draws, shapes]."""
    return np.clip((targets * weights) @ basis.T / np.maximum((basis**2 * weights).sum(1), 1e-30), 0, 1)


def _affine(basis: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a and c of y ≈ a·basis + c with a ≥ 0 and a + c ≤ 1, each [draws, shapes]."""
    mean_x, mean_y = basis @ weights, targets @ weights
    spread = np.maximum((basis**2) @ weights - mean_x**2, 1e-15)
    a = ((targets * weights) @ basis.T - mean_y[:, None] * mean_x) / spread
    a = np.maximum(a, 0)
    c = mean_y[:, None] - a * mean_x
    # Where the limit would exceed 1 it is 1: y − 1 ≈ −a·(1 − basis).
    rest = 1 - basis
    bounded = ((1 - targets) * weights) @ rest.T / np.maximum((rest**2) @ weights, 1e-15)
    over = a + c > 1
    return np.where(over, np.maximum(bounded, 0), a), np.where(over, 1 - np.maximum(bounded, 0), c)
