"""What a decomposition did, layer by layer: as a table, as JSON, as a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from effcore.files import write_atomically
from effcore.methods.low_rank_layers import Rank


@dataclass
class LayerReport:
    """One layer. Errors are relative norms: of the weight, and of the outputs under the calibration's inputs."""

    name: str
    kind: str
    shape: list[int]
    rank: Rank | None
    parameters_before: int
    parameters_after: int
    error: float = 0.0
    output_error: float | None = None
    ms_before: float | None = None
    ms_after: float | None = None
    note: str = ""


@dataclass
class DecompositionReport:
    """What :func:`effcore.decompose` did to a model for a target ("ratio 2.0"), layer by layer and in all."""

    target: str
    layers: list[LayerReport] = field(default_factory=list)
    parameters_before: int = 0  # of the model
    parameters_after: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # batches, ranks (the search, with its timings), factors

    @property
    def ratio(self) -> float:
        """The model's parameters before, over those after."""
        return self.parameters_before / max(self.parameters_after, 1)

    def total_ms(self) -> tuple[float, float] | None:
        """Milliseconds of the timed layers in one pass, before and after."""
        timed = [x for x in self.layers if x.ms_before is not None and x.ms_after is not None]
        if not timed:
            return None
        return sum(x.ms_before or 0.0 for x in timed), sum(x.ms_after or 0.0 for x in timed)

    def table(self) -> str:
        """A line a layer, and one of the whole."""

        def number(x: float | None, form: str) -> str:
            return "" if x is None else format(x, form)

        head = ("layer", "kind", "shape", "rank", "parameters", "error", "outputs", "ms", "note")
        rows = [
            (
                x.name,
                x.kind,
                "x".join(map(str, x.shape)),
                "dense" if x.rank is None else str(x.rank).replace(" ", ""),
                f"{x.parameters_before} -> {x.parameters_after}",
                "" if x.rank is None else f"{x.error:.3f}",
                number(x.output_error, ".3f"),
                "" if x.ms_before is None else f"{x.ms_before:.3f} -> {number(x.ms_after, '.3f')}",
                x.note,
            )
            for x in self.layers
        ]
        widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in (head, *rows)]
        total = f"{self.target}: {self.parameters_before} -> {self.parameters_after} parameters ({self.ratio:.2f}x)"
        if (ms := self.total_ms()) is not None:
            total += f", layers {ms[0]:.3f} -> {ms[1]:.3f} ms ({ms[0] / max(ms[1], 1e-12):.2f}x)"
        return "\n".join([*lines, total])

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        return asdict(self) | {"ratio": self.ratio}

    def write_json(self, path: str | Path) -> None:
        """:meth:`as_dict` into a file, whole or not at all."""
        write_atomically(Path(path), json.dumps(self.as_dict(), indent=1))

    def plot(self, path: str | Path) -> None:
        """Parameters with ranks, errors and, where layers were timed, milliseconds before and after (PNG or SVG)."""
        from matplotlib.figure import Figure

        shown = [x for x in self.layers if x.rank is not None or x.ms_before is not None]
        timed = any(x.ms_before is not None for x in shown)
        figure = Figure(figsize=(9, max(2.5, 0.22 * len(shown) + 1)), layout="constrained")
        axes: Any = figure.subplots(1, 3 if timed else 2, sharey=True, squeeze=False)[0]
        at = list(range(len(shown)))
        axes[0].barh(at, [x.parameters_before for x in shown], color="#d0d0d0", label="dense")
        axes[0].barh(at, [x.parameters_after for x in shown], color="#2a6f97", label="now")
        for i, x in enumerate(shown):
            what = "dense" if x.rank is None else f"rank {x.rank}"
            end = (x.parameters_before, i)
            axes[0].annotate(what, end, (3, 0), textcoords="offset points", va="center", fontsize=6)
        axes[0].margins(x=0.3)  # for these words
        axes[0].set_xlabel("parameters")
        axes[0].set_yticks(at, [x.name for x in shown], fontsize=6)
        axes[0].invert_yaxis()
        axes[0].legend(fontsize=7)
        axes[1].barh(at, [x.error for x in shown], color="#bc4749", label="of the weight")
        outputs = [(x.output_error, i) for i, x in enumerate(shown) if x.output_error is not None]
        if outputs:
            axes[1].plot(*zip(*outputs, strict=True), "|", color="black", ms=7, mew=2, label="of the outputs")
            axes[1].legend(fontsize=7)
        axes[1].set_xlabel("relative error" if outputs else "relative error of the weight")
        if timed:
            axes[2].barh(at, [x.ms_before or 0 for x in shown], color="#d0d0d0")
            axes[2].barh(at, [x.ms_after or 0 for x in shown], color="#2a6f97")
            axes[2].set_xlabel("ms a pass")
        figure.suptitle(f"{self.target}: {self.ratio:.2f}x fewer parameters", fontsize=9)
        figure.savefig(path, dpi=130)
