"""The claim of TTC-aware stopping: `python -m benchmarks.claims.ttc [--quick]`.

A small LLaMA learns to put letters in order, from scratch (:mod:`benchmarks.claims._sorting`). The full run has its own decayed
learning rate. The stopped run trains at a constant rate, evaluates K = 1, 2, 4, 8 samples of each validation query at every
checkpoint (one reading of each prompt), and stops. K samples become one answer by majority vote, or by a learned verifier
that is trained once on corrupted answers (--metric). On a test split: the full run's single sample, the same with K*
samples, the stopped model at K*, and the stopped checkpoint with its learning rate decayed over a tenth more steps.

Counted as training: all steps up to the stop, the verifier's training, and every token generated and verified for
evaluation. The paper: up to 92 % fewer training FLOPs. Exhaustive search is K = 1 .. K_max drawn separately at every
checkpoint; beside it, K_max drawn once at each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]

from benchmarks.claims import _sorting as task  # noqa: E402
from effcore.methods.sampling import sample_texts  # noqa: E402
from effcore.methods.ttc import Costs, TTCEarlyStopping  # noqa: E402
from effcore.methods.ttc_accuracy import Samples  # noqa: E402

LETTERS = (8, 9, 10, 11, 12)


def evaluator(tokenizer: Any, queries: list[str], seed: int, verifier: Any):
    """(model, n) -> n samples of each query at temperature 1."""

    def evaluate(model: Any, n: int) -> Samples:
        texts = sample_texts(
            model,
            tokenizer,
            queries,
            num_samples=n,
            max_new_tokens=max(LETTERS) + 1,
            batch_size=len(queries),
            seed=seed,
            temperature=1.0,
            top_k=0,
        )
        correct = np.array([[task.is_right(q, t) for t in row] for q, row in zip(queries, texts, strict=True)])
        scores = None
        if verifier is not None:
            flat = verifier.score([q for q in queries for _ in range(n)], [t for row in texts for t in row])
            scores = np.array(flat).reshape(len(queries), n)
        return Samples(correct, texts, scores, tokens=sum(len(t) + 1 for row in texts for t in row))

    return evaluate


def one(seed: int, options: argparse.Namespace, verifier: Any) -> dict[str, Any]:
    """Both runs of a seed."""
    from effcore.data import byte_tokenizer

    tokenizer, batch, steps = byte_tokenizer(), options.batch, options.steps
    tokens_per_step = batch * task.LENGTH
    draw = lambda rng: task.problem(rng, rng.choice(LETTERS))  # noqa: E731
    validation = [p for p, _ in task.problems(10**6 + seed, options.items, LETTERS)]
    test = evaluator(tokenizer, [p for p, _ in task.problems(2 * 10**6 + seed, options.items, LETTERS)], 7, verifier)

    def model():
        return task.fresh(seed, layers=options.layers, width=options.width).to(options.device)

    began = time.perf_counter()
    full = model()
    task.train(full, draw, steps=steps, batch=batch, peak=options.peak, seed=seed)
    full_seconds = time.perf_counter() - began

    stopped = model()
    length = max(LETTERS) + 1
    costs = Costs.measure(stopped, prompt=length, new=length)
    verifier_training = 0.0  # in training tokens of the model
    if verifier is not None:
        read = Costs.measure(verifier.model, prompt=1, new=2 * length - 1)
        costs = Costs(costs.train, costs.generate, 2 * read.generate)  # it reads prompt and response for each response
        verifier_training = options.verifier_steps * options.verifier_batch * 2 * length * read.train / costs.train
    stopper = TTCEarlyStopping(
        evaluator(tokenizer, validation, 5, verifier),
        budget=steps * tokens_per_step,
        metric=options.metric,
        most_samples=options.most_samples,
        costs=costs,
    )
    every = max(steps // options.checkpoints, 1)
    at_30: list[float] = []

    def check(step: int) -> bool:
        if (step + 1) % every or (stopper.decision and stopper.decision.stop):
            return False
        decision = stopper.check(stopped, (step + 1) * tokens_per_step)
        stopped.train()
        if step + 1 <= 0.3 * steps and decision.projected is not None:
            at_30[:] = [decision.projected]
        return decision.stop

    constant = lambda step: options.peak * min((step + 1) / (0.05 * steps), 1.0)  # noqa: E731
    trainer = task.train(
        stopped, draw, steps=steps, batch=batch, peak=options.peak, seed=seed, each=check, schedule=constant
    )
    decision = stopper.decision
    assert decision is not None
    at = round(decision.tokens / tokens_per_step)
    k = decision.samples if decision.stop and decision.samples else 1
    many = max(k, 8)
    ours, theirs = test(stopped, many), test(full, many)
    # The same checkpoint with its rate decayed to 0 over a tenth more steps.
    more = max(at // 10, 1)
    task.train(
        stopped,
        draw,
        steps=at + more,
        batch=batch,
        peak=options.peak,
        seed=seed,
        first=at,
        schedule=lambda step: options.peak * (1 - (step - at) / more),
        trainer=trainer,
    )
    decayed = test(stopped, many)
    # The constant run's own end, which the projection is about: trained on only to check it.
    truth = None
    if options.check_projection and at_30:
        rest = model()
        task.train(rest, draw, steps=steps, batch=batch, peak=options.peak, seed=seed, schedule=constant)
        truth = evaluator(tokenizer, validation, 5, verifier)(rest, 8).accuracy(1, options.metric)
    evaluated = len(stopper.decisions)
    answer = options.items * (sum(LETTERS) / len(LETTERS) + 1)  # tokens of one sample of each query
    row = {
        "seed": seed,
        "stopped": decision.stop,
        "stop_share": at / steps,
        "saved": decision.saved - verifier_training / (steps * tokens_per_step) if decision.stop else 0.0,
        "verifier_training_share": verifier_training / (steps * tokens_per_step),
        "K": k,
        "full_single": theirs.accuracy(1, options.metric),
        "full_at_K": theirs.accuracy(k, options.metric),
        "stopped_single": ours.accuracy(1, options.metric),
        "stopped_at_K": ours.accuracy(k, options.metric),
        "stopped_pass_at_K": ours.accuracy(k, "pass"),
        "decayed_single": decayed.accuracy(1, options.metric),
        "decayed_at_K": decayed.accuracy(k, options.metric),
        "projected": decision.projected,
        "projected_at_30": at_30[0] if at_30 else None,
        "constant_run": truth,
        "evaluation_share": stopper.evaluation_tokens / (evaluated * answer * sum(range(1, options.most_samples + 1))),
        "evaluation_share_reused": stopper.evaluation_tokens / (evaluated * answer * options.most_samples),
        "break_even_tokens": decision.break_even,
        "full_seconds": full_seconds,
        "decisions": [d.as_json() for d in stopper.decisions],
    }
    print({key: value for key, value in row.items() if key != "decisions"}, flush=True)
    print(decision.reason, flush=True)
    return row


def show(rows: list[dict]) -> str:
    def mean(key: str) -> str:
        values = [row[key] for row in rows if row[key] is not None]
        if not values:
            return "not seen"
        spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1%}{spread}"

    lines = ["| | |", "|---|---|"]
    for key, name in (
        ("saved", "training FLOPs saved, evaluation and verifier charged (the paper: up to 92 %)"),
        ("full_single", "full run, one sample"),
        ("stopped_at_K", "stopped run, K* samples"),
        ("full_at_K", "full run, K* samples"),
        ("stopped_single", "stopped run, one sample"),
        ("decayed_at_K", "stopped and decayed, K* samples"),
        ("decayed_single", "stopped and decayed, one sample"),
        ("projected_at_30", "projection at 30 % of the budget"),
        ("constant_run", "what it projects: the constant run's end"),
        ("evaluation_share", "evaluation cost of exhaustive search's"),
        ("evaluation_share_reused", "the same, where that draws K_max once"),
    ):
        lines.append(f"| {name} | {mean(key)} |")
    lines.append(f"| K* | {', '.join(str(row['K']) for row in rows)} |")
    return "\n".join(lines)


def draw_curves(path: Path, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
    for row, color in zip(rows, ("#0072B2", "#D55E00", "#009E73"), strict=False):
        x = [d["tokens"] for d in row["decisions"]]
        for k, style in (("1", "-"), ("8", "--")):
            axes.plot(
                x,
                [d["accuracies"][k] for d in row["decisions"]],
                style,
                color=color,
                label=f"seed {row['seed']}, K = {k}",
            )
        axes.axhline(row["full_single"], color=color, linestyle=":", alpha=0.7)
        axes.plot([x[-1]], [row["stopped_at_K"]], "*", markersize=12, color=color)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("accuracy")
    axes.set_title("K samples on validation; dotted: the full run's single sample; stars: K* on test", fontsize=9)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.ttc", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=6000, help="the full run's budget")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--items", type=int, default=500, help="queries for validation, and as many for the test")
    parser.add_argument("--checkpoints", type=int, default=40, help="evaluations over the budget")
    parser.add_argument("--most-samples", type=int, default=32)
    parser.add_argument("--metric", choices=("majority", "verifier"), default="verifier")
    parser.add_argument("--verifier-steps", type=int, default=1500)
    parser.add_argument("--verifier-batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--check-projection", action="store_true", help="also train the constant run to its end")
    parser.add_argument("--quick", action="store_true", help="one seed of a tiny model: that it runs, no result")
    parser.add_argument("--json", type=Path, default=Path("ttc.json"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.batch, options.items, options.seeds = 60, 16, 20, [0]
        options.layers, options.width, options.checkpoints, options.verifier_steps = 1, 32, 6, 5
    verifier = None
    if options.metric == "verifier":
        base = task.fresh(0, layers=options.layers, width=options.width).to(options.device)
        verifier = task.verifier(LETTERS, base, steps=options.verifier_steps, batch=options.verifier_batch)
    rows = [one(seed, options, verifier) for seed in options.seeds]
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"machine": machine, "torch": torch.__version__, "settings": settings, "runs": rows}, indent=1)
        + "\n"
    )
    print(show(rows))
    draw_curves(options.json.with_suffix(".png"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
