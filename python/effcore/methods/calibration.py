"""Are probabilities honest? Scores of predicted probabilities [N, C] against labels [N], temperature scaling, and the picture.

- NLL: -mean log p(label). Brier: mean Σ_c (p_c - [c = label])². Both are proper: least in expectation for the true
probabilities.
- ECE (Naeini et al. 2015; 15 bins as in Guo et al. 2017, arXiv:1706.04599): predictions fall into bins of equal width by their
  confidence, the greatest probability; the mean over predictions of |accuracy - confidence| of their bin.
- OOD AUROC: how often an input from elsewhere is less certain than one of the kind that was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from effcore.errors import InputError

BINS = 15


def _checked(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if probabilities.dim() != 2 or labels.shape != probabilities.shape[:1] or labels.is_floating_point():
        raise InputError(
            f"effcore.calibration: expected probabilities [N, classes] and integer labels [N], "
            f"got {list(probabilities.shape)} and {labels.dtype} {list(labels.shape)}"
        )
    if not len(labels):
        raise InputError("effcore.calibration: there are no predictions")
    p, y = probabilities.detach().double().cpu(), labels.detach().long().cpu()
    if not (int(y.min()) >= 0 and int(y.max()) < p.shape[1]):
        raise InputError(
            f"effcore.calibration: labels go from {int(y.min())} to {int(y.max())} with {p.shape[1]} classes"
        )
    if not bool(((p >= 0).all(1) & ((p.sum(1) - 1).abs() < 1e-3)).all()):
        raise InputError("effcore.calibration: each row of probabilities must be from 0 to 1 and sum to 1")
    return p, y


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood in nats of labels [N] under probabilities [N, C]."""
    p, y = _checked(probabilities, labels)
    return float(-p.gather(1, y[:, None]).clamp_min(1e-12).log().mean())


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """Brier score of probabilities [N, C] and labels [N], from 0 to 2."""
    p, y = _checked(probabilities, labels)
    return float((p - torch.nn.functional.one_hot(y, p.shape[1])).square().sum(1).mean())


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """The share of rows of probabilities [N, C] that are greatest at their label [N]."""
    p, y = _checked(probabilities, labels)
    return float((p.argmax(1) == y).double().mean())


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> tuple[Tensor, Tensor, Tensor]:
    """``(confidence, accuracy, share)`` of each bin, [bins]; an empty bin has share 0 and NaN."""
    p, y = _checked(probabilities, labels)
    confidence, predicted = p.max(1)
    # Bins are (0, 1/n], (1/n, 2/n], ...
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(number, minlength=bins).double()
    right = torch.bincount(number, (predicted == y).double(), minlength=bins)
    return torch.bincount(number, confidence, minlength=bins) / count, right / count, count / len(y)


def ece(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error of probabilities [N, C] and labels [N], from 0 to 1."""
    confidence, right, share = reliability(probabilities, labels, bins)
    return float(((right - confidence).abs() * share).nan_to_num().sum())


def ood_auroc(inside: Tensor, outside: Tensor) -> float:
    """The area under the ROC curve of telling ``outside`` from ``inside`` [N, C] by confidence; 0.5 is chance."""
    scores = [1 - p.detach().double().cpu().max(1).values for p in (inside, outside)]
    if not all(map(len, scores)):
        raise InputError("effcore.calibration: there are no predictions")
    both = torch.cat(scores)
    _, rank, count = both.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    ranks = (last - (count - 1) / 2)[rank]  # ties share their mean rank
    n, m = len(scores[0]), len(scores[1])
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


def scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """accuracy, nll, ece and brier of probabilities [N, C] and labels [N]."""
    functions = {"accuracy": accuracy, "nll": nll, "ece": ece, "brier": brier}
    return {name: function(probabilities, labels) for name, function in functions.items()}


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T > 0 whose softmax(logits / T) has the least NLL, on data that the model was not trained on.

    Args:
        logits: [N, C].
        labels: integers [N].
    """
    wide, y = logits.detach().double().cpu(), labels.detach().long().cpu()
    _checked(wide.softmax(1), y)
    log_inverse = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_inverse], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(wide * log_inverse.exp(), y)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return float((-log_inverse.detach()).exp())


def draw_reliability(path: str | Path, predictions: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """A reliability diagram for each entry, (probabilities [N, C], labels [N]) by name, side by side: accuracy over confidence,
    the diagonal, and how many predictions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, row = plt.subplots(
        1, len(predictions), figsize=(3.4 * len(predictions), 3.6), layout="constrained", squeeze=False
    )
    for axes, (name, (p, y)) in zip(row[0], predictions.items(), strict=True):
        _, right, share = reliability(p, y)
        centres = (torch.arange(BINS) + 0.5) / BINS
        axes.bar(centres, share / share.max() * 0.3, 1 / BINS, color="#BBBBBB", label="share of predictions (scaled)")
        axes.plot([0, 1], [0, 1], "--", color="#000000", linewidth=1)
        filled = share > 0
        axes.plot(centres[filled], right[filled], "o-", color="#0072B2", label="accuracy")
        axes.set(
            xlim=(0, 1), ylim=(0, 1), xlabel="confidence", title=f"{name}\nECE {ece(p, y):.3f}, NLL {nll(p, y):.3f}"
        )
    row[0][0].set_ylabel("accuracy")
    row[0][0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)
