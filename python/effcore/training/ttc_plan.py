"""Answers ``effcore plan ttc``: a table of checkpoint accuracies in, the decision at each checkpoint and a picture out."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np

from effcore.errors import InputError, input_error
from effcore.methods.ttc import Decision, TTCPlan
from effcore.methods.ttc_curves import TooFew

Point = tuple[float, dict[int, float]]


def read_points(path: Path) -> list[Point]:
    """Checkpoints of a CSV with a column ``tokens`` and accuracies (0 to 1) in columns named by their number of samples: ``1``,
    ``2``, ``4``, ``8`` (or ``pass@1``, ``majority@8``). An empty cell was not measured.

    Raises:
        InputError: naming the file, the row and what was expected.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
            names = list(rows[0]) if rows else []
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file ({error})") from error
    columns = {
        name: int(match[1]) for name in names if name and (match := re.fullmatch(r"(?:.*@)?(\d+)", name.strip()))
    }
    if "tokens" not in names or 1 not in columns.values():
        raise InputError(f"{path}: expected the columns tokens, 1, 2, 4, 8 (samples), got {names or 'no rows'}")
    if len(set(columns.values())) < len(columns):
        raise InputError(f"{path}: several columns for the same number of samples among {list(columns)}")
    points: list[Point] = []
    for number, row in enumerate(rows, start=2):
        try:
            tokens = float(row["tokens"])
            accuracies = {k: float(row[name]) for name, k in columns.items() if row[name] and row[name].strip()}
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: not a number ({error})") from error
        points.append((tokens, accuracies))
    return sorted(points, key=lambda point: point[0])


def decide(plan: TTCPlan, points: list[Point]) -> list[Decision]:
    """The decisions up to the first that stops. A K* that the table has is confirmed by its measured accuracy."""
    decisions = []
    for tokens, accuracies in points:

        def confirm(samples: int, accuracies: dict[int, float] = accuracies) -> tuple[float, float]:
            return accuracies[samples], 0.0

        try:
            decision = plan.add(tokens, accuracies)
            if decision.stop and decision.samples in accuracies:
                plan.points.pop()
                decision = plan.add(tokens, accuracies, confirm=confirm)
        except ValueError as error:
            raise input_error(error, f"{tokens:g} tokens") from error
        decisions.append(decision)
        if decision.stop:
            break
    return decisions


def draw(path: Path, plan: TTCPlan, points: list[Point], decisions: list[Decision]) -> None:
    """Both curves at the last checkpoint decided on, the stop, and the break-even bound over K."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    last = decisions[-1]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    tokens = np.array([t for t, _ in points])
    left.plot(tokens, [a[1] for _, a in points], "o", color="0.6", label="checkpoints, 1 sample")
    seen = [(t, a[1]) for t, a in points if t <= last.tokens]
    left.plot(*zip(*seen, strict=True), "o", color="#0072B2", label="seen so far")
    middle.plot(list(last.accuracies), list(last.accuracies.values()), "o", color="#0072B2", label="measured")
    try:
        training, sampling = plan.curves()
        x = np.linspace(tokens.min() * 0.5, plan.budget, 200)
        for axes, at, curve in (
            (left, x, training),
            (middle, np.geomspace(1, plan.most_samples, 100), sampling),
        ):
            value, low, high = curve.values(at)
            axes.plot(at, value, color="#D55E00", label="fit")
            axes.fill_between(at, low, high, color="#D55E00", alpha=0.2, label=f"{plan.confidence:.0%} bounds")
        goal = training(plan.budget).value
        middle.axhline(goal, color="0.3", linestyle=":", label=f"full budget, projected: {goal:.1%}")
    except TooFew as missing:
        left.set_title(str(missing), fontsize=8, wrap=True)
    if last.stop:
        left.axvline(last.tokens, color="#009E73", label="stop")
        if last.samples:
            middle.axvline(last.samples, color="#009E73", label=f"K* = {last.samples}")
    ks = np.arange(2, plan.most_samples + 1)
    bounds = [plan.costs.break_even(plan.budget - last.tokens, int(k)) for k in ks]
    right.plot(ks, bounds, color="#0072B2", label="T_max")
    if plan.lifetime:
        right.axhline(plan.lifetime, color="0.3", linestyle=":", label="expected lifetime")
    if any(bounds):
        right.set_yscale("log")
    for axes, x_label, y_label in (
        (left, "training tokens", "accuracy"),
        (middle, "samples a query", "accuracy"),
        (right, "samples a query", "generated tokens up to which it pays"),
    ):
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(fontsize=8)
    middle.set_xscale("log", base=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
