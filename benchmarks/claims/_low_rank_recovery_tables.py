"""The tables and the picture of `low_rank progressive`: perplexity against the length of the recovery and against its rate."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.claims._low_rank_recovery import FADING, ONE, STAGES

KINDS = (ONE, STAGES, FADING)
COLORS = {ONE: "#2a6f97", STAGES: "#bc4749", FADING: "#6a994e"}
Rows = list[dict[str, Any]]


def _reported(rows: Rows) -> Rows:
    return [r for r in rows if r.get("trial") is False]


def _settings(way: dict[str, Any]) -> str:
    """What a way does, without what it does not use."""
    svd = "weighted" if way["weighted"] else "plain"
    text = f"rate {way['lr']:.2g} over {way['warm']} steps to {way['end']:g} of it, {svd}"
    if way["kind"] == STAGES:
        text += f", {way['stages']} stages in {way['early']:.0%}"
    if way["kind"] == FADING:
        text += f", over {way['early']:.0%}"
    return text


def table(rows: Rows) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: each length of the recovery, each way, each seed."""
    done = _reported(rows)
    seeds = sorted({r["seed"] for r in done})
    lines = []
    for steps in sorted({r["steps"] for r in done}):
        at = {(r["way"]["kind"], r["seed"]): r for r in done if r["steps"] == steps}
        for kind in KINDS:
            mine = [at[kind, s] for s in seeds if (kind, s) in at]
            if not mine:
                continue
            against = [r["perplexity"] / at[ONE, r["seed"]]["perplexity"] - 1 for r in mine if (ONE, r["seed"]) in at]
            trials = [r for r in rows if r.get("trial") and r["steps"] == steps and r["way"]["kind"] == kind]
            lines.append(
                (
                    str(steps),
                    kind,
                    ", ".join(f"{r['perplexity']:.3f}" for r in mine),
                    f"{mean(r['perplexity'] for r in mine):.3f}",
                    "" if kind == ONE else ", ".join(f"{a:+.2%}" for a in against),
                    _settings(mine[0]["way"]),
                    str(len(trials)),
                )
            )
    head = ("steps", "way", "perplexity, each seed", "mean", "to one step", "settings", "trials")
    return head, lines


def _by_rate(rows: Rows, steps: int, kind: str) -> list[tuple[float, float]]:
    """(rate, perplexity) of the trials that differ in the rate alone, the largest such set."""
    sets: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        if r.get("trial") and r["steps"] == steps and r["way"]["kind"] == kind:
            key = str({k: v for k, v in r["way"].items() if k != "lr"})
            sets.setdefault(key, []).append((r["way"]["lr"], r["perplexity"]))
    return sorted(max(sets.values(), key=len, default=[]))


def picture(rows: Rows, image: Path) -> None:
    """Of the trials of the length that was searched most: the best of each way along the recovery, and all rates; and, where
    seeds are reported, what is gained at the end of each length."""
    from matplotlib.figure import Figure

    done = _reported(rows)
    trials = [r for r in rows if r.get("trial")]
    steps = max({r["steps"] for r in trials}, key=lambda n: len(_by_rate(rows, n, ONE)))
    figure = Figure(figsize=(13.5 if done else 9, 3.8), layout="constrained")
    along, rates, *ends = figure.subplots(1, 3 if done else 2)
    for kind in KINDS:
        color: Any = COLORS[kind]
        mine = [r for r in trials if (r["steps"], r["way"]["kind"]) == (steps, kind)]
        if mine:
            losses = min(mine, key=lambda r: r["perplexity"])["losses"]
            width = steps / len(losses)
            along.plot([(i + 0.5) * width for i in range(len(losses))], losses, ".-", color=color, label=kind)
        rates.plot(*zip(*_by_rate(rows, steps, kind), strict=True), "o-", color=color, label=kind)
    along.set(xlabel="steps of recovery", ylabel="training loss, nats a byte")
    along.set_title("the best trial of each way, the same batches", fontsize=9)
    rates.set(xscale="log", xlabel="peak of the learning rate", ylabel="perplexity, held out")
    rates.set_title(f"after {steps} steps, all else equal", fontsize=9)
    for axis in ends:
        lengths = sorted({r["steps"] for r in done})
        for kind in (STAGES, FADING):
            _ends(axis, done, lengths, kind)
        axis.axhline(0, color=COLORS[ONE], label=ONE)
        axis.set(xscale="log", xlabel="steps of recovery", ylabel="perplexity against one step, %")
        axis.set_title("at the end: each seed, and the mean", fontsize=9)
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.minorticks_off()
    for axis in (along, rates, *ends):
        axis.legend(fontsize=7)
    figure.savefig(image, dpi=130)


def _ends(axis: Any, done: Rows, lengths: Iterable[int], kind: str) -> None:
    line = []
    for steps in lengths:
        at = {(r["way"]["kind"], r["seed"]): r["perplexity"] for r in done if r["steps"] == steps}
        seeds = [s for k, s in at if k == kind and (ONE, s) in at]
        gains = [100 * (at[kind, s] / at[ONE, s] - 1) for s in seeds]
        if gains:
            axis.plot([steps] * len(gains), gains, "_", color=COLORS[kind], ms=12)
            line.append((steps, mean(gains)))
    if line:
        axis.plot(*zip(*line, strict=True), ".-", color=COLORS[kind], label=kind)
