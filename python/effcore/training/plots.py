"""Pictures of runs: loss over tokens, speed over tokens, bytes of cache. Runs keep their colour from picture to picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from effcore.training.metrics_file import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Run = tuple[str, Sequence[Row]]  # title, metrics

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers tell them apart in print.
_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw(runs: Sequence[Run], folder: Path) -> list[str]:
    """Writes ``loss.png``, ``speed.png``, ``cache.png`` and ``overview.png`` (all three) into ``folder``; returns the names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    panels: dict[str, Callable[[Axes, Sequence[Run]], None]] = {"loss": _loss, "speed": _speed, "cache": _cache}
    style: Any = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    }
    with plt.rc_context(style):
        for name, panel in panels.items():
            figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
            panel(axes, runs)
            axes.legend(frameon=False, fontsize=9)
            figure.savefig(folder / f"{name}.png", dpi=150)
            plt.close(figure)
        figure, row = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
        for axes, panel in zip(row, panels.values(), strict=True):
            panel(axes, runs)
        handles, labels = row[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
        figure.savefig(folder / "overview.png", dpi=150)
        plt.close(figure)
    return [f"{name}.png" for name in (*panels, "overview")]


@dataclass(frozen=True)
class _Tokens:
    """The unit of the token axis, so that short runs and long ones have readable numbers."""

    divisor: float
    name: str

    @classmethod
    def of(cls, runs: Sequence[Run]) -> _Tokens:
        most = max((row["tokens"] for _, rows in runs for row in rows), default=0)
        units = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
        return next((cls(divisor, name) for divisor, name in units if most >= divisor), cls(1.0, "tokens"))

    def series(self, rows: Sequence[Row], kind: str, key: str) -> tuple[list[float], list[Any]]:
        """Tokens in this unit, and the values of ``key``."""
        chosen = [row for row in rows if row["kind"] == kind and row.get(key) is not None]
        return [row["tokens"] / self.divisor for row in chosen], [row[key] for row in chosen]

    def switches(self, rows: Sequence[Row]) -> list[float]:
        """Where the layout changed."""
        trained = [row for row in rows if row["kind"] == "train"]
        return [
            after["tokens"] / self.divisor for before, after in pairwise(trained) if before["layout"] != after["layout"]
        ]

    def label(self, axes: Axes) -> None:
        axes.set_xlabel(f"training tokens ({self.name})")


def _loss(axes: Axes, runs: Sequence[Run]) -> None:
    unit = _Tokens.of(runs)
    validated: list[float] = []
    for number, (title, rows) in enumerate(runs):
        color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
        tokens, losses = unit.series(rows, "train", "loss")
        axes.plot(tokens, _running(fmean, losses, len(losses) // 12), color=color, alpha=0.35, linewidth=1)
        tokens, losses = unit.series(rows, "validation", "loss")
        axes.plot(tokens, losses, color=color, marker=marker, markersize=4, label=title)
        validated += losses
        for position in unit.switches(rows):
            axes.axvline(position, color=color, alpha=0.3, linewidth=0.8, linestyle=":")
    if validated:  # the first steps' losses would flatten everything that matters
        low, high = min(validated), max(validated)
        axes.set_ylim(low - 0.1 * (high - low) - 0.02, high + 0.3 * (high - low) + 0.02)
    unit.label(axes)
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(
        "Loss: validation (markers), training (faint, running mean),\nswitches of the schedule (dotted)", fontsize=10
    )


def _speed(axes: Axes, runs: Sequence[Run]) -> None:
    unit = _Tokens.of(runs)
    for number, (title, rows) in enumerate(runs):
        tokens, speeds = unit.series(rows, "train", "tokens_per_second")
        axes.plot(tokens, _running(median, speeds, 5), color=_COLORS[number % len(_COLORS)], label=title)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    unit.label(axes)
    axes.set_ylabel("training speed (tokens per second)")
    axes.set_title("Training speed (running median)", fontsize=10)


def _cache(axes: Axes, runs: Sequence[Run]) -> None:
    unit = _Tokens.of(runs)
    for number, (title, rows) in enumerate(runs):
        tokens, sizes = unit.series(rows, "train", "cache_bytes_per_token")
        axes.step(
            tokens, [size / 1024 for size in sizes], where="post", color=_COLORS[number % len(_COLORS)], label=title
        )
    axes.set_ylim(bottom=0)
    unit.label(axes)
    axes.set_ylabel("KV cache (KiB per token)")
    axes.set_title("KV cache that the model needs at inference", fontsize=10)


def _running(statistic: Callable[[Sequence[float]], float], values: Sequence[float], width: int) -> list[float]:
    """``statistic`` of the values around each one, ``width`` of them."""
    half = max(width, 1) // 2
    return [statistic(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
