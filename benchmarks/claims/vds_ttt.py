"""VDS-TTT's claim: `python -m benchmarks.claims.vds_ttt [--quick]`, and its sampling: `... vds_ttt --sampling`.

A small LLaMA has learnt to put 6 to 9 letters in order, with few longer ones among them (:mod:`benchmarks.claims._sorting`).
The queries are longer. A learned verifier that begins as the model is trained on corrupted answers and on the model's own, of
every length and never of the queries (:mod:`benchmarks.claims._sorting_verifier`). Its threshold is calibrated on problems of
its own too; how well it tells right from wrong there is printed first (AUROC). It picks the model's own samples for
test-time training. On the adapted queries and on a held-out half: greedy, best-of-N by the verifier, majority and oracle,
before and after; standard errors over queries, and the differences with their standard error over the seeds (paired) and over
the queries (as if before and after were independent: the larger one).

Settings are chosen with --split validation, whose queries are others; the result is from the test queries.

The paper: Llama-3.2-1B on GSM8K 40.2 -> 72.5 at N = 16, the verifier's best-of-N alone 71.5.

--sampling: N samples of each prompt with one reading of it against generate(num_return_sequences=N), alternating, for several
lengths; beside each ratio the one that the lengths allow, (N·read + decode) / (read + decode) by the model's measured times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path = [str(ROOT), *sys.path, str(ROOT / "python")]  # an installed effcore, with its libraries, before the sources

from benchmarks.claims import _runs  # noqa: E402
from benchmarks.claims import _sorting as task  # noqa: E402
from benchmarks.claims._sampling_speed import sampling  # noqa: E402
from benchmarks.claims._sampling_speed import table as sampling_table  # noqa: E402
from benchmarks.claims._small_lm import fresh, train  # noqa: E402
from benchmarks.claims._sorting_verifier import verifier as learned_verifier  # noqa: E402
from effcore.data import byte_tokenizer  # noqa: E402
from effcore.methods.sampling import sample_texts  # noqa: E402
from effcore.methods.vds_report import COLUMNS, measure, table  # noqa: E402
from effcore.methods.vds_ttt import LoraSettings, VerifierTTT  # noqa: E402
from effcore.methods.verifiers import Verifier, calibrate  # noqa: E402

SHORT = (6, 7, 8, 9)
SPLITS = {"test": (1, 2), "validation": (5, 6)}  # millions that the queries' seeds begin with: adapted, held out


def auroc(scores: np.ndarray, right: np.ndarray) -> float:
    """The chance that a right response scores above a wrong one, ties half."""
    from scipy.stats import rankdata

    ranks, many = rankdata(scores), int(right.sum())
    return float((ranks[right].sum() - many * (many + 1) / 2) / max(many * (len(right) - many), 1))


def calibration(model: object, verifier: Verifier, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """The verifier on samples to problems that are no queries: how well it ranks, and the τ at which it is right."""
    asked = task.prompts(7 * 10**6 + seed, options.items, options.long)
    n = options.num_samples
    texts = sample_texts(
        model,
        byte_tokenizer(),
        asked,
        num_samples=n,
        max_new_tokens=max(options.long) + 2,
        batch_size=options.items,
        seed=9,
        temperature=0.8,
        top_k=0,
    )
    scores = np.array(verifier.score([p for p in asked for _ in range(n)], [t for row in texts for t in row]))
    right = np.array([task.is_right(p, t) for p, row in zip(asked, texts, strict=True) for t in row])
    scores, right = scores.reshape(-1, n), right.reshape(-1, n)
    best = np.arange(len(asked)), scores.argmax(1)
    found = {"auroc": auroc(scores.ravel(), right.ravel()), "right": float(right.mean())}
    try:
        found["threshold"] = calibrate(scores[best].tolist(), right[best].tolist(), precision=options.precision)
    except ValueError as error:
        print(error, file=sys.stderr)
        found["threshold"] = 1.0
    chosen = scores[best] >= found["threshold"]
    return found | {
        "selected": float(chosen.mean()),
        "precision": float(right[best][chosen].mean()) if chosen.any() else 0.0,
    }


def base_model(seed: int, long_share: float, options: argparse.Namespace) -> LlamaForCausalLM:
    """Trained on short problems, and on so many as long as the queries."""
    model = fresh(seed, layers=options.layers, width=options.width).to(options.device)
    mix = dict.fromkeys(SHORT, (1 - long_share) / len(SHORT))
    mix |= dict.fromkeys(options.long, long_share / len(options.long))
    train(model, task.draws(mix), steps=options.steps, batch=options.batch, peak=options.peak, seed=seed)
    return model.eval()


def room(options: argparse.Namespace) -> list[tuple[float, float]]:
    """How well the base model answers validation queries, for each share of long problems in its training."""
    asked, found = task.prompts(SPLITS["validation"][0] * 10**6, options.items, options.long), []
    settings = {
        "num_samples": 1,
        "max_new_tokens": max(options.long) + 2,
        "batch_size": options.items,
        "do_sample": False,
    }
    for share in options.long_shares:
        texts = sample_texts(base_model(90, share, options), byte_tokenizer(), asked, **settings)
        found.append((share, statistics.mean(task.is_right(p, row[0]) for p, row in zip(asked, texts, strict=True))))
        print(f"{share:.3%} long problems: {found[-1][1]:.1%} of the validation queries", flush=True)
    return found


def one(seed: int, options: argparse.Namespace) -> dict:
    began = time.perf_counter()
    model = base_model(seed, options.long_share, options)
    trained = time.perf_counter() - began
    verifier = learned_verifier(
        (*SHORT, *options.long),
        model,
        steps=options.verifier_steps,
        batch=2 * options.batch,
        count=options.verifier_problems,
        own=True,
    )
    trusted = calibration(model, verifier, seed, options)
    print(f"seed {seed}, the verifier: {trusted}", flush=True)
    sets = {
        name: task.prompts(million * 10**6 + seed, options.items, options.long)
        for name, million in zip(("adapted", "held out"), SPLITS[options.split], strict=True)
    }
    learner = VerifierTTT(
        model,
        byte_tokenizer(),
        verifier,
        num_samples=options.num_samples,
        threshold=trusted["threshold"],
        max_new_tokens=max(options.long) + 2,
        lora=LoraSettings(options.rank, 2.0 * options.rank, 0.1),
        learning_rate=options.learning_rate,
        iterations=options.iterations,
        generation_batch=options.items,
        seed=seed,
    )

    def accuracies(now: Any, queries: Sequence[str]) -> dict[str, float]:
        return measure(learner, now, queries, lambda i, text: task.is_right(queries[i], text), lambda text: text)

    def report(now: Any) -> dict[str, dict]:
        return {name: accuracies(now, queries) for name, queries in sets.items()}

    before = report(model)
    began = time.perf_counter()
    adapted = learner.adapt(sets["adapted"])
    seconds = time.perf_counter() - began
    after = report(adapted)
    rows = {
        f"{when}, {name}": row for when, part in (("before", before), ("after", after)) for name, row in part.items()
    }
    print(f"seed {seed}: trained on {learner.selected} of {options.items} queries\n{table(rows)}", flush=True)
    return {
        "seed": seed,
        "verifier": trusted,
        "selected": learner.selected,
        "rows": rows,
        "training_seconds": trained,
        "seconds": seconds,
    }


def summarise(runs: list[dict]) -> tuple[dict, dict]:
    """Means over the seeds with the standard error over them, and the two differences that the paper claims."""
    rows: dict[str, dict[str, float]] = {}
    for name in runs[0]["rows"]:
        rows[name] = {}
        for column in COLUMNS:
            values = [run["rows"][name][column] for run in runs]
            rows[name][column] = statistics.mean(values)
            rows[name][f"{column}_error"] = (
                statistics.stdev(values) / len(values) ** 0.5
                if len(values) > 1
                else runs[0]["rows"][name][f"{column}_error"]
            )
    gains = {}
    for name, column in (("adapted", "best_of_n"), ("held out", "best_of_n"), ("held out", "greedy")):
        pairs = [(run["rows"][f"before, {name}"], run["rows"][f"after, {name}"]) for run in runs]
        values = [after[column] - before[column] for before, after in pairs]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        over_queries = sum(row[f"{column}_error"] ** 2 for pair in pairs for row in pair) ** 0.5 / len(pairs)
        gains[f"{column}, {name}"] = {"gain": statistics.mean(values), "error": error, "query_error": over_queries}
    return rows, gains


def draw(path: Path, runs: list[dict]) -> None:
    """A panel a seed: its bases differ more than what is to be seen, which is the gain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (4.2 * len(runs), 4.2)
    figure, panels = pyplot.subplots(1, len(runs), figsize=size, sharey=True, squeeze=False, layout="constrained")
    colors = {"before, adapted": "#9ecae1", "after, adapted": "#0072B2"}
    colors |= {"before, held out": "#fdd0a2", "after, held out": "#D55E00"}
    for axes, run in zip(panels[0], runs, strict=True):
        for i, (name, color) in enumerate(colors.items()):
            values, errors = ([100 * run["rows"][name][f"{c}{end}"] for c in COLUMNS] for end in ("", "_error"))
            x = [c + 0.2 * (i - 1.5) for c in range(len(COLUMNS))]
            axes.bar(x, values, 0.2, yerr=errors, capsize=2, color=color, label=name)
        axes.set_xticks(range(len(COLUMNS)), ["greedy", "best-of-N", "majority", "oracle"])
        axes.set_title(f"seed {run['seed']}, {sum(run['selected'])} pairs trained on", fontsize=9)
    panels[0][0].set_ylabel("accuracy (%)")
    panels[0][0].set_ylim(0, 100)
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, ncol=4, loc="outside upper center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.vds_ttt", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sampling", action="store_true", help="time sampling instead")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of the base model")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--peak", type=float, default=3e-3, help="the base model's learning rate")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument(
        "--long-shares",
        type=float,
        nargs="+",
        default=[0.0, 1e-4, 3e-4, 1e-3, 2e-3],
        help="of problems as long as the queries in base training; of several the one is taken whose base model answers "
        "nearest to half of the validation queries",
    )
    parser.add_argument("--long", type=int, nargs="+", default=[12, 13, 14], help="letters of the queries")
    parser.add_argument(
        "--split", choices=tuple(SPLITS), default="test", help="which queries; to choose settings: validation"
    )
    parser.add_argument("--items", type=int, default=500, help="queries to adapt to, and as many held out")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--precision", type=float, default=0.95, help="of what is selected: τ is calibrated for it")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the LoRA training")
    parser.add_argument("--iterations", type=int, default=1)
    parser.add_argument("--verifier-steps", type=int, default=3000)
    parser.add_argument("--verifier-problems", type=int, default=40_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one seed of a tiny model: that it runs, no result")
    parser.add_argument(
        "--merge", type=Path, nargs="+", help="only put together what these results of other seeds hold"
    )
    parser.add_argument(
        "--json", type=Path, help="default: vds_ttt.json, vds_sampling.json; what it holds is not run again"
    )
    options = parser.parse_args(arguments)
    options.json = options.json or Path("vds_sampling.json" if options.sampling else "vds_ttt.json")
    if options.quick:
        options.steps, options.items, options.verifier_steps, options.layers = 20, 16, 5, 1
        options.seeds = options.seeds[:1]
        options.batch, options.verifier_problems, options.rounds, options.long_shares = 32, 200, 1, [0.01, 0.03]
    if options.sampling:
        timed = []
        for row in sampling(options.device, options.rounds):
            timed.append(row)
            _runs.write(options.json, _runs.describe(options) | {"rows": timed})
        print(sampling_table(timed))
        return 0
    head = _runs.describe(options)
    runs = _runs.kept(options.json, head)
    if options.merge:
        head = _runs.merge(options.merge)
        runs, options.seeds = head["runs"], []
    missing = [seed for seed in options.seeds if seed not in [run["seed"] for run in runs]]
    # Chosen once; a result that goes on keeps to it.
    shares = runs[0]["shares"] if runs else room(options) if missing else []
    options.long_share = min(shares, key=lambda pair: abs(pair[1] - 0.5), default=(None,))[0]
    for seed in missing:
        runs.append(one(seed, options) | {"shares": shares, "long_share": options.long_share})
        _runs.write(options.json, head | {"runs": runs})
    rows, gains = summarise(runs)
    _runs.write(options.json, head | {"runs": runs, "mean": rows, "gains": gains})
    print(f"mean of {len(runs)} seeds ± standard error\n{table(rows)}\n{json.dumps(gains, indent=1)}")
    draw(options.json.with_suffix(".png"), runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
