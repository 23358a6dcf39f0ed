"""The tables of docs/low-rank.md, and the picture of the ResNets' gains, from the files that the claims write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.claims import _low_rank_recovery_tables


def table(path: Path) -> str:
    """Markdown for a file of any `low_rank` claim but smollm, or of benchmarks/ops/lowrank_cuda.py."""
    report = json.loads(path.read_text())
    rows = report["rows"]
    if report.get("claim") == "speed":
        return _gains([r for r in rows if r["variant"] != "spent"]) + _steps(
            [r for r in rows if r["variant"] == "spent"]
        )
    if report.get("claim") == "progressive":
        return _lines(*_low_rank_recovery_tables.table(rows))
    if report.get("claim") == "layers":
        return _lines(
            ("convolution", "pixels", "forward, us", "of the bound", "input's gradient", "weight's gradient"),
            [
                (
                    f"{r['kernel']}x{r['kernel']}, {r['in']} -> {r['out']}"
                    + (", stride 2" if r["stride"] == 2 else ""),
                    f"{r['side']}x{r['side']}",
                    f"{r['forward']:.1f}",
                    f"{r['bound'] / r['forward']:.0%}",
                    f"{r['input']:.1f}",
                    f"{r['weight']:.1f}",
                )
                for r in rows
            ],
        )
    if report.get("claim") == "parts":
        return _lines(
            ("part", "torch's, us", "effcore's, us", "bound, us", "of the bound"),
            [
                (
                    r["part"],
                    f"{r['torch']['us']:.0f}",
                    f"{r['effcore']['us']:.0f}",
                    f"{r['bound_us']:.0f}",
                    f"{r['bound_us'] / r['effcore']['us']:.0%}",
                )
                for r in rows
            ],
        )
    if report.get("claim") == "short":
        return _lines(
            ("model", "variant", "layers", "rank", "input", "ms dense", "ms", "saved in all", "predicted"),
            [
                (
                    r["model"],
                    r["variant"],
                    f"{r['layers']} × {r['weight']}",
                    str(r["rank"]),
                    str(r["input"]),
                    f"{r['ms_dense']:.3f}",
                    f"{r['ms']:.3f}",
                    f"{r['layers'] * (r['ms_dense'] - r['ms']):.2f}",
                    f"{r['ms_predicted']:.2f}",
                )
                for r in sorted(rows, key=lambda r: r["layers"] * (r["ms_dense"] - r["ms"]) - r["ms_predicted"])[:10]
            ],
        )
    if report.get("claim") == "search":
        return _lines(
            ("model", "timed for", "factors", "seconds", "batches", "ranks", "factors"),
            [
                (
                    r["model"],
                    r["measure"],
                    "weighted" if r["weighted"] else "plain",
                    f"{r['seconds']:.1f}",
                    *(f"{s:.1f}" for s in r["parts"].values()),
                )
                for r in rows
            ],
        )
    return _lines(
        (
            "pass",
            "rows",
            "in -> out",
            "rank",
            "effcore, us",
            "two products",
            "dense",
            "to two",
            "to dense",
            "of the bound",
        ),
        [
            (
                r["what"],
                str(r["rows"]),
                f"{r['in']} -> {r['out']}",
                str(r["rank"]),
                *(f"{r[way]:.1f}" if way in r else "" for way in ("effcore", "two", "dense")),
                f"{r['two'] / r['effcore']:.2f}x",
                f"{r['dense'] / r['effcore']:.2f}x" if "dense" in r else "",
                f"{r['bound'] / r['effcore']:.0%}",
            )
            for r in rows
        ],
    )


def _gains(rows: list[dict[str, Any]]) -> str:
    return _lines(
        (
            "model",
            "what",
            "variant",
            "M parameters",
            "images/s",
            "dense",
            "gained",
            "roofline",
            "of its gain",
            "of its ms",
            "paper",
        ),
        [
            (
                r["model"],
                r["what"],
                r["variant"],
                f"{r['parameters'] / 1e6:.1f}",
                f"{r['images_s']:.0f}",
                f"{r['images_s_dense']:.0f}",
                f"{r['ratio']:.2f}x",
                f"{r['ratio_roofline']:.2f}x",
                "" if r["of_the_roofline_gain"] is None else f"{r['of_the_roofline_gain']:.0%}",
                _of_the_milliseconds(r),
                "" if r["paper_gain_percent"] is None else f"{1 + r['paper_gain_percent'] / 100:.2f}x",
            )
            for r in rows
        ],
    )


def _steps(rows: list[dict[str, Any]]) -> str:
    """Microseconds of a step by kind of kernel, and the roofline's."""
    if not rows:
        return ""
    kinds = list(rows[0]["dense"]["us"])
    return "\n\n" + _lines(
        ("model", "what", "variant", *(f"{kind}, us (roofline)" for kind in kinds)),
        [
            (
                r["model"],
                r["what"],
                name,
                *(f"{us:.0f} ({r[name]['roofline_us'][kind]:.0f})" for kind, us in r[name]["us"].items()),
            )
            for r in rows
            for name in ("dense", "merging", "timed ranks", "timed ranks, freezing")
            if name in r
        ],
    )


def _of_the_milliseconds(r: dict[str, Any]) -> str:
    """The time that a variant of `speed` saves, beside what the roofline says it saves."""
    saved = r["images"] * (1 / r["images_s_dense"] - 1 / r["images_s"])
    predicted = r["seconds_dense_roofline"] * (1 - 1 / r["ratio_roofline"])
    return f"{saved / predicted:.0%}" if predicted > 0 else ""


def _lines(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)])


def picture(path: Path, image: Path) -> None:
    """Of a file of `low_rank speed`: each variant's gain, the roofline's and the paper's. Or of `low_rank progressive`."""
    from matplotlib.figure import Figure

    report = json.loads(path.read_text())
    if report.get("claim") == "progressive":
        return _low_rank_recovery_tables.picture(report["rows"], image)
    rows: list[dict[str, Any]] = [r for r in report["rows"] if r["variant"] != "spent"]
    groups = sorted({(r["model"], r["what"]) for r in rows})
    figure = Figure(figsize=(4.5 * len(groups), 3.6), layout="constrained")
    axes: Any = figure.subplots(1, len(groups), squeeze=False)[0]
    for axis, (model, what) in zip(axes, groups, strict=True):
        mine = [r for r in rows if (r["model"], r["what"]) == (model, what)]
        at = range(len(mine))
        axis.barh(at, [r["ratio"] for r in mine], color="#2a6f97", label="measured")
        axis.plot([r["ratio_roofline"] for r in mine], at, "|", color="#bc4749", ms=14, mew=2, label="roofline")
        paper = [
            (1 + r["paper_gain_percent"] / 100, i) for i, r in enumerate(mine) if r["paper_gain_percent"] is not None
        ]
        if paper:
            axis.plot(*zip(*paper, strict=True), "d", color="#6a994e", label="the paper's")
        axis.axvline(1.0, color="black", lw=0.8)
        axis.set_yticks(at, [r["variant"] for r in mine], fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel("images a second against dense")
        axis.set_title(f"{model} {what}", fontsize=9)
        axis.legend(fontsize=6)
    figure.savefig(image, dpi=130)
