"""The claim of TTC-aware stopping: `python -m benchmarks.claims.ttc [--quick]`.

A small LLaMA learns from scratch to add digits in any order (:mod:`benchmarks.claims._adding`), or to put letters in order
(:mod:`benchmarks.claims._sorting`, --task sorting). The full run has its own decayed learning rate. The stopped run trains at
a constant rate; what is evaluated of it is the moving average of its weights, which comes close to what decaying the rate would
give. At every checkpoint K = 1, 2, 4, 8 samples of each validation query are evaluated (one reading of each prompt), and the
stopper decides; a majority vote makes one answer of K samples, so nothing at test time knows what is right. On a test split:
the full run's single sample, the same with K* samples, its greedy answer, the stopped model at K*, and the stopped checkpoint
with its learning rate decayed over a tenth more steps. Behind the stop the constant run goes on to 30 % of the budget,
uncounted, to see what is projected there; the truth is the full run's one sample on the validation queries.

Counted as training: all steps up to the stop, and every token generated for evaluation. The paper: up to 92 % fewer training
FLOPs. Exhaustive search is K = 1 .. K_max drawn separately at every checkpoint; beside it, K_max drawn once at each.

Settings are chosen with --split validation, which draws other queries; the result is from the test queries.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path = [str(ROOT), *sys.path, str(ROOT / "python")]  # an installed effcore, with its libraries, before the sources

from benchmarks.claims import _adding, _runs, _sorting  # noqa: E402
from benchmarks.claims._small_lm import fresh, train  # noqa: E402
from benchmarks.claims._step import TrainStep  # noqa: E402
from effcore.data import byte_tokenizer  # noqa: E402
from effcore.methods.sampling import sample_texts  # noqa: E402
from effcore.methods.ttc import Costs, TTCEarlyStopping  # noqa: E402
from effcore.methods.ttc_accuracy import Samples  # noqa: E402
from effcore.methods.ttc_curves import TooFew, fit_training  # noqa: E402

TASKS: dict[str, Any] = {"adding": _adding, "sorting": _sorting}
STAGES = {"stopped": "K", "full": "full_single"}  # and what each leaves in a row
SPLITS = {"test": 2, "validation": 5}  # millions that the seeds of the queries begin with


class Evaluator:
    """``evaluator(model, n)``: n samples of each query at temperature 1."""

    def __init__(self, task: Any, queries: list[str], new: int, seed: int):
        self.task, self.queries, self.new, self.seed = task, queries, new, seed

    def __call__(self, model: Any, n: int) -> Samples:
        return self.samples(model, n, {"temperature": 1.0, "top_k": 0})

    def greedy(self, model: Any) -> float:
        return self.samples(model, 1, {"do_sample": False}).accuracy(1, "pass")

    def samples(self, model: Any, n: int, settings: dict[str, Any]) -> Samples:
        texts = sample_texts(
            model,
            byte_tokenizer(),
            self.queries,
            num_samples=n,
            max_new_tokens=self.new,
            batch_size=len(self.queries),
            seed=self.seed,
            **settings,
        )
        right = self.task.is_right
        correct = np.array([[right(q, t) for t in row] for q, row in zip(self.queries, texts, strict=True)])
        answers = [[self.task.result(t) for t in row] for row in texts]
        return Samples(correct, answers, tokens=sum(len(t) + 1 for row in texts for t in row))


class Trial:
    """A seed: the run that is stopped, and the full one."""

    def __init__(self, seed: int, options: argparse.Namespace):
        self.seed, self.options = seed, options
        self.steps, self.task = options.steps, TASKS[options.task]
        self.sizes = range(options.size[0], options.size[1] + 1)
        self.new = self.task.PER_ITEM * max(self.sizes) + 1  # tokens of an answer with its end
        self.draw = self.task.draws(dict.fromkeys(self.sizes, 1.0))
        self.tokens_per_step = options.batch * (max(self.sizes) + 1 + self.new)
        self.every = max(self.steps // options.checkpoints, 1)
        self.settings: dict[str, Any] = {
            "batch": options.batch,
            "peak": options.peak,
            "seed": seed,
            "compiled": options.compile,
        }
        self.validation, self.test = self._evaluator(1, 5), self._evaluator(SPLITS[options.split], 7)
        self.began = time.monotonic()

    def _evaluator(self, million: int, seed_of_samples: int) -> Evaluator:
        asked = self.task.prompts(million * 10**6 + self.seed, self.options.items, self.sizes)
        return Evaluator(self.task, asked, self.new, seed_of_samples)

    def _model(self) -> Any:
        return fresh(self.seed, layers=self.options.layers, width=self.options.width).to(self.options.device)

    def _tell(self, what: str, step: int, found: str) -> None:
        seconds = time.monotonic() - self.began
        print(f"seed {self.seed}, {what}, step {step}, {seconds:.0f} s: {found}", flush=True)

    def constant(self, step: int) -> float:
        """The learning rate of the run that is stopped."""
        return self.options.peak * min((step + 1) / (0.05 * self.steps), 1.0)

    def stopped(self) -> dict[str, Any]:
        """The stopped run with its decisions, and what would have been projected at 30 % of the budget."""
        options = self.options
        running = self._model()
        average = copy.deepcopy(running)
        stopper = TTCEarlyStopping(
            self.validation,
            budget=self.steps * self.tokens_per_step,
            most_samples=options.most_samples,
            margin=options.margin,
            costs=Costs.measure(running, prompt=max(self.sizes) + 1, new=self.new),
        )
        last = round(0.3 * self.steps)
        held: list[Any] = []  # models and moments at the stop
        later: list[tuple[float, float]] = []  # (tokens, accuracy of one sample) behind it

        def each(step: int, trainer: TrainStep) -> bool:
            done = step + 1
            if done % options.average_every == 0:  # the mean of about the last 3 % of the steps
                with torch.no_grad():
                    rate = min(options.average_every / (0.03 * done), 1.0)
                    torch._foreach_lerp_(list(average.parameters()), list(running.parameters()), rate)
            if done % self.every == 0 and not held:
                decision = stopper.check(average, done * self.tokens_per_step)
                self._tell("stopped run", done, f"{decision.accuracies}, {decision.reason}")
                if decision.stop or done == self.steps:
                    held.extend(copy.deepcopy([average, running, trainer.moments()]))
            elif done % self.every == 0:
                now = self.validation(average, 8).accuracy(1, "majority")
                later.append((done * self.tokens_per_step, now))
                self._tell("had it gone on", done, f"{now:.1%}")
            return bool(held) and done >= last

        settings = self.settings | {"schedule": self.constant, "each": each}
        train(running, self.draw, steps=self.steps, **settings)
        decision = stopper.decisions[-1]
        at = round(decision.tokens / self.tokens_per_step)
        k = decision.samples if decision.stop and decision.samples else 1
        stopped, decayed, moments = held
        # The same checkpoint with its rate decayed to 0 over a tenth more steps.
        more = max(at // 10, 1)
        down = lambda step: options.peak * (1 - (step - at) / more)  # noqa: E731
        settings = self.settings | {"first": at, "moments": moments, "schedule": down}
        train(decayed, self.draw, steps=at + more, **settings)
        ours, theirs = self.test(stopped, max(k, 8)), self.test(decayed, max(k, 8))
        evaluated = len(stopper.decisions)
        # Tokens of one sample of each query, every K up to K_max at every checkpoint or K_max once.
        answer = options.items * (self.task.PER_ITEM * sum(self.sizes) / len(self.sizes) + 1) * evaluated
        spent, most = stopper.evaluation_tokens, options.most_samples
        return {
            "seed": self.seed,
            "stopped": decision.stop,
            "budget": stopper.plan.budget,
            "stop_step": at,
            "stop_share": at / self.steps,
            "saved": decision.saved,
            "K": k,
            "stopped_single": ours.accuracy(1, "majority"),
            "stopped_greedy": self.test.greedy(stopped),
            "stopped_at_K": ours.accuracy(k, "majority"),
            "stopped_pass_at_K": ours.accuracy(k, "pass"),
            "decayed_single": theirs.accuracy(1, "majority"),
            "decayed_at_K": theirs.accuracy(k, "majority"),
            "projected": decision.projected,
            "evaluation_share": spent / (answer * sum(range(1, most + 1))),
            "evaluation_share_reused": spent / (answer * most),
            "break_even_tokens": decision.break_even,
            "decisions": [d.as_json() for d in stopper.decisions],
            **self.projected([(d.tokens, d.accuracies[1]) for d in stopper.decisions] + later),
        }

    def projected(self, seen: list[tuple[float, float]]) -> dict[str, Any]:
        """From the checkpoints up to 30 % of the budget: the projection for the whole."""
        budget = self.steps * self.tokens_per_step
        seen = [point for point in seen if point[0] <= 0.3 * budget * (1 + 1e-9)]
        try:
            tokens, accuracies = np.array(seen).T
            found = fit_training(tokens, accuracies, self.options.items)(budget)
        except TooFew:
            return {"points_to_30": seen}
        return {
            "points_to_30": seen,
            "projected_at_30": found.value,
            "projected_at_30_bounds": (found.low, found.high),
        }

    def full(self) -> dict[str, Any]:
        """The run of the whole budget, with its own decayed rate."""
        model = self._model()

        def each(step: int, trainer: TrainStep) -> bool:
            if (step + 1) % 1000 == 0:
                self._tell("full run", step + 1, f"loss {trainer.result[0].item():.3f}" if trainer.graph else "")
            return False

        train(model, self.draw, steps=self.steps, each=each, **self.settings)
        theirs = self.test(model, 8)
        return {
            "full_single": theirs.accuracy(1, "majority"),
            "full_greedy": self.test.greedy(model),
            "full_by_samples": {k: theirs.accuracy(k, "majority") for k in range(1, 9)},
            "full_on_validation": self.validation(model, 8).accuracy(1, "majority"),
        }


def errors(row: dict[str, Any]) -> dict[str, Any]:
    """Of the projections, against the full run's one sample on the validation queries; and the full run with K* samples."""
    if "full_on_validation" not in row:
        return {}
    found = {"full_at_K": row["full_by_samples"].get(str(row.get("K")))}
    for name in ("projected", "projected_at_30"):
        if row.get(name) is not None:
            found[f"{name}_error"] = abs(row[name] - row["full_on_validation"])
    return found


def show(rows: list[dict]) -> str:
    def mean(key: str) -> str:
        values = [row[key] for row in rows if row.get(key) is not None]
        if not values:
            return "not seen"
        spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1%}{spread}"

    lines = ["| | |", "|---|---|"]
    for key, name in (
        ("saved", "training FLOPs saved, evaluation charged (the paper: up to 92 %)"),
        ("full_single", "full run, one sample"),
        ("stopped_at_K", "stopped run, K* samples"),
        ("full_greedy", "full run, greedy"),
        ("full_at_K", "full run, K* samples"),
        ("stopped_single", "stopped run, one sample"),
        ("stopped_greedy", "stopped run, greedy"),
        ("decayed_at_K", "stopped and decayed, K* samples"),
        ("decayed_single", "stopped and decayed, one sample"),
        ("full_on_validation", "the full run on the validation queries, one sample"),
        ("projected", "projected for it at the stop"),
        ("projected_error", "the error"),
        ("projected_at_30", "projected for it at 30 % of the budget"),
        ("projected_at_30_error", "the error"),
        ("evaluation_share", "evaluation cost of exhaustive search's"),
        ("evaluation_share_reused", "the same, where that draws K_max once"),
    ):
        lines.append(f"| {name} | {mean(key)} |")
    lines.append(f"| K* | {', '.join(str(row['K']) for row in rows)} |")
    columns = {
        "one sample there": "stopped_single",
        "K* samples": "stopped_at_K",
        "full run, one sample": "full_single",
        "saved": "saved",
        "projected at the stop": "projected",
        "at 30 %": "projected_at_30",
        "came (validation)": "full_on_validation",
    }
    lines += ["", "| | stopped at | K* | " + " | ".join(columns) + " |", "|---" * (3 + len(columns)) + "|"]
    for row in rows:
        cells = [f"{row[key]:.1%}" if row.get(key) is not None else "" for key in columns.values()]
        lines.append(f"| seed {row['seed']} | {row['stop_share']:.1%} | {row['K']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_curves(path: Path, rows: list[dict]) -> None:
    """A panel a seed: both curves up to the stop and what was projected there, as in the paper's figures, and what came."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (4.2 * len(rows), 4.0)
    figure, panels = pyplot.subplots(1, len(rows), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, row in zip(panels[0], rows, strict=True):
        at = [100 * d["tokens"] / row["budget"] for d in row["decisions"]]
        for k, color in (("1", "#0072B2"), ("2", "#56B4E9"), ("4", "#E69F00"), ("8", "#D55E00")):
            seen = [100 * d["accuracies"][k] for d in row["decisions"]]
            axes.plot(at, seen, "o-", markersize=3, color=color, label=f"K = {k}")
        later = [(100 * tokens / row["budget"], 100 * seen) for tokens, seen in row.get("points_to_30", [])]
        later = [point for point in later if point[0] >= at[-1]]
        if later:
            axes.plot(*zip(*later, strict=True), ":", color="#0072B2", label="K = 1, had it gone on")
        if row.get("projected") is not None:
            axes.axhline(100 * row["projected"], color="0.5", linewidth=1, label="projected for the full budget")
        if "full_single" in row:
            axes.axhline(
                100 * row["full_single"], color="k", linestyle="--", linewidth=1, label="full run, one sample (test)"
            )
        label = "the stopped run with K* samples (test)"
        axes.plot(
            at[-1], 100 * row["stopped_at_K"], "*", markersize=14, color="#009E73", markeredgecolor="k", label=label
        )
        axes.set_title(
            f"seed {row['seed']}: stopped at {row['stop_share']:.1%} of the budget, K* = {row['K']}", fontsize=9
        )
        axes.set_xlabel("training tokens (% of the budget)")
        axes.set_xlim(0, 32 if row["stop_share"] < 0.3 else 101)
    panels[0][0].set_ylabel("accuracy (%)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, ncol=4, loc="outside upper center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.ttc", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=12_000, help="the full run's budget")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--peak", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--task", choices=tuple(TASKS), default="adding")
    parser.add_argument("--size", type=int, nargs=2, default=[8, 20], help="fewest and most items of a problem")
    parser.add_argument("--items", type=int, default=500, help="queries for validation, and as many for the test")
    parser.add_argument(
        "--split", choices=tuple(SPLITS), default="test", help="which queries; to choose settings: validation"
    )
    parser.add_argument("--checkpoints", type=int, default=40, help="evaluations over the budget")
    parser.add_argument("--average-every", type=int, default=10, help="steps between additions to the moving average")
    parser.add_argument("--most-samples", type=int, default=32)
    parser.add_argument("--margin", type=float, default=0.01, help="accuracy that may be lost to the projection")
    parser.add_argument("--compile", action="store_true", help="the training steps through torch.compile")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--stages", choices=tuple(STAGES), nargs="+", default=list(STAGES), help="to do some now and others later"
    )
    parser.add_argument("--quick", action="store_true", help="one seed of a tiny model: that it runs, no result")
    parser.add_argument(
        "--merge", type=Path, nargs="+", help="only put together what these results of other seeds or stages hold"
    )
    parser.add_argument("--json", type=Path, default=Path("ttc.json"), help="what it holds is not run again")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.batch, options.items, options.seeds = 60, 16, 20, [0]
        options.layers, options.width, options.checkpoints = 1, 32, 6
    head = _runs.describe(options)
    rows = _runs.kept(options.json, head)
    if options.merge:
        parts = [row for path in options.merge for row in _runs.kept(path, head)]
        by_seed: dict[int, dict] = {}
        for row in parts:
            by_seed[row["seed"]] = by_seed.get(row["seed"], {}) | row
        rows = [by_seed[seed] for seed in sorted(by_seed)]

    def kept(seed: int) -> dict[str, Any]:
        return next((row for row in rows if row["seed"] == seed), {"seed": seed})

    def done(trial: Trial, found: dict[str, Any]) -> None:
        nonlocal rows
        found = json.loads(json.dumps(found))
        print(f"seed {trial.seed}: {json.dumps({k: v for k, v in found.items() if k != 'decisions'})}", flush=True)
        row = kept(trial.seed) | found
        rows = sorted([other for other in rows if other["seed"] != trial.seed] + [row], key=lambda row: row["seed"])
        _runs.write(options.json, head | {"runs": rows})

    for stage in [] if options.merge else options.stages:
        for seed in options.seeds:
            if STAGES[stage] not in kept(seed):
                trial = Trial(seed, options)
                done(trial, getattr(trial, stage)())
    rows = [row | errors(row) for row in rows]
    _runs.write(options.json, head | {"runs": rows})
    whole = [row for row in rows if "K" in row]
    if whole:
        print(show(whole))
        draw_curves(options.json.with_suffix(".png"), whole)
    return 0


if __name__ == "__main__":
    sys.exit(main())
