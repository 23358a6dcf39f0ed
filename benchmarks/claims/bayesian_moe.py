"""Bayesian-MoE's claim: `python -m benchmarks.claims.bayesian_moe [--task lines] --out FOLDER [--json FILE] [--picture FILE]`.

A small Qwen2-MoE answers questions with one right answer of several:
- lines: which of four lines of a source file comes next. The model learns the text of the machine first (Python sources and C++
  headers, as a language model) and then, from each seed, questions about other Python files. Text of another kind: headers.
- packages: which of eight of PyTorch's packages a piece of code comes from, learnt from scratch. Text of another kind: the
  docstrings and comments of the same packages.

Then MAP, temperature scaling, MC dropout, an ensemble of five, a last-layer Laplace approximation, Laplace-LoRA and
Bayesian-MoE are scored by accuracy, NLL, ECE (15 bins) and Brier, on files that were not trained on, and on text of another
kind. OOD AUROC tells the two kinds apart by confidence. Temperatures and priors, one for each layer, are chosen on files of
their own; posteriors over experts also with one prior for all layers, and together with a temperature.

The paper (arXiv:2511.08968) reports lower ECE and NLL than its baselines for Qwen1.5-MoE and DeepSeek-MoE on common-sense
questions, without training again. Our goals: ECE at least halved against MAP, NLL lower than MAP on both kinds, accuracy
within 0.3 points, NLL on text of another kind lower than that of temperature scaling.

Each seed is a file FOLDER/seed<n>.json, written again after each method; seeds that are complete there are not run again, so
that several calls can share the work (after --prepare, side by side). The ensemble of seed n are models n to n + 4: seeds
share them, and --only-members trains some for others to find. The table is over all seeds of FOLDER, and the methods that they
all have.

What is not a matter of course (epochs, pretraining) is tried out with --development, on files that are not scored otherwise,
and a seed that is not reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims._bayesian_task import Task
from benchmarks.claims._runs import differing
from effcore.methods.bayesian_moe import Posterior, laplace
from effcore.methods.calibration import draw_reliability, fit_temperature, ood_auroc, scores
from effcore.methods.laplace_file import read_safetensors, write_safetensors

# fmt: off
DEFAULTS: dict[str, dict[str, Any]] = {
    "lines": {
        "seeds": [1, 2, 3], "train": 8000, "test": 4000, "batch": 64, "epochs": 3, "rate": 3e-4, "pretraining": 1200,
    },
    "packages": {"seeds": [0, 1, 2], "train": 6000, "test": 4000, "batch": 128, "epochs": 8, "rate": 2e-3},
}
# fmt: on
TESTS = ("test", "other")
PARTS = (*TESTS, "held")
GRID = torch.logspace(-6, 6, 31).tolist()  # prior variances
PICTURED = ("MAP", "temperature", "Bayesian-MoE")
Predictions = dict[str, Tensor]  # probabilities [N, C] of each test set


class Seed:
    """The record of one seed, on disk after each method."""

    def __init__(self, seed: int, task: Task, options: argparse.Namespace):
        self.seed, self.task, self.options = seed, task, options
        self.began = time.perf_counter()
        self.methods: dict[str, dict[str, Any]] = {}
        self.pictured: dict[str, Tensor] = {}

    def say(self, what: str) -> None:
        print(f"seed {self.seed}: {what} ({time.perf_counter() - self.began:.0f} s)", file=sys.stderr, flush=True)

    def add(self, name: str, p: Predictions, **facts: Any) -> None:
        """``gained`` and ``lost``: answers that are right where MAP's were wrong, and the other way round."""
        row: dict[str, Any] = {part: scores(p[part], self.task.labels(part)) for part in TESTS}
        self.say(
            f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in row["test"].items())
            + f", other NLL {row['other']['nll']:.4f} {facts or ''}"
        )  # fmt: skip
        labels = self.task.labels("test")
        if name in PICTURED:
            self.pictured[name] = p["test"]
            tensors = self.pictured | {"labels": labels}
            write_safetensors(file_of(self.options.out, self.seed).with_suffix(".safetensors"), tensors, {})
        before, now = (q.argmax(1) == labels for q in (self.pictured["MAP"], p["test"]))
        changed = {"gained": int((now & ~before).sum()), "lost": int((before & ~now).sum())}
        self.methods[name] = row | {"ood_auroc": ood_auroc(p["test"], p["other"])} | changed | facts
        self.write(complete=False)

    def write(self, *, complete: bool) -> None:
        report = {
            "claim": "bayesian_moe",
            "seed": self.seed,
            "complete": complete,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.options.device.startswith("cuda") else "cpu",
            "settings": settings_of(self.options),
            "questions": {part: len(self.task.labels(part)) for part in self.task.data},
            "models": self.task.about,
            "seconds": time.perf_counter() - self.began,
            "methods": self.methods,
        }
        file_of(self.options.out, self.seed).write_text(json.dumps(report, indent=1))


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What results hang on."""
    others = ("out", "json", "picture", "seeds", "prepare", "pretraining_seconds", "only_members")
    return {k: v for k, v in vars(options).items() if k not in others}


def make_task(options: argparse.Namespace) -> Task:
    settings = {name: getattr(options, name) for name in ("test", "batch", "epochs", "rate", "device")}
    settings["train_on"] = options.train
    if options.task == "packages":
        from benchmarks.claims._bayesian_classifier import packages_task

        return packages_task(**settings)
    from benchmarks.claims._bayesian_lines import lines_task

    tiny = {"most_bytes": 2 << 20, "windows": 4, "width": 128, "layers": 2} if options.quick else {}
    return lines_task(
        options.out, **settings, pretraining=options.pretraining, seconds=options.pretraining_seconds,
        development=options.development, **tiny,
    )  # fmt: skip


def file_of(folder: Path, seed: int) -> Path:
    return folder / f"seed{seed}.json"


def member(number: int, task: Task, options: argparse.Namespace) -> tuple[Any, Predictions]:
    """A trained model and its logits, which stay in a file for the ensembles of other seeds."""
    model = task.member(number)
    logits = {part: task.logits(model, part) for part in PARTS}
    write_safetensors(member_file(options, number), logits, {"settings": settings_of(options)})
    return model, logits


def logits_of_member(number: int, task: Task, options: argparse.Namespace) -> Predictions:
    """Of the file, where there is one of these settings."""
    if member_file(options, number).exists():
        logits, about = read_safetensors(member_file(options, number))
        if not differing(settings_of(options), about["settings"]):
            return logits
    return member(number, task, options)[1]


def member_file(options: argparse.Namespace, number: int) -> Path:
    return options.out / f"member{number}.safetensors"


def is_complete(seed: int, options: argparse.Namespace) -> bool:
    """Whether this seed's file has all its rows; exits where they are of other settings."""
    file = file_of(options.out, seed)
    if not file.exists():
        return False
    report = json.loads(file.read_text())
    if other := differing(settings_of(options), report["settings"]):
        sys.exit(f"{file} holds rows with another {other}: give another --out, or remove it")
    return report["complete"]


def run_seed(seed: int, task: Task, options: argparse.Namespace) -> None:
    record = Seed(seed, task, options)
    model, plain = member(seed, task, options)
    record.say("trained")
    temperature = fit_temperature(plain["held"], task.labels("held"))
    record.add("MAP", {part: plain[part].softmax(1) for part in TESTS})
    record.add("temperature", {part: (plain[part] / temperature).softmax(1) for part in TESTS}, temperature=temperature)
    score_posterior(record, "Bayesian-MoE", model, "experts")
    record.add("MC dropout", {part: task.dropout(model, part) for part in TESTS})
    score_posterior(record, "last-layer Laplace", model, "last")
    if not options.no_lora:
        score_posterior(record, "Laplace-LoRA", task.adapted(model, seed), "lora")
    all_logits = [plain] + [logits_of_member(seed + i, task, options) for i in range(1, options.members)]
    mean = {part: torch.stack([logits[part].softmax(1) for logits in all_logits]).mean(0) for part in TESTS}
    record.add(f"ensemble of {options.members}", mean)
    record.write(complete=True)


def score_posterior(record: Seed, name: str, model: Any, targets: str) -> None:
    """With a prior variance a layer; of experts also with one for all layers, and with a temperature."""
    task, start = record.task, time.perf_counter()
    posterior = laplace(model, task.data["fit"], answers=task.answers, targets=targets, rank=record.options.rank)
    seconds = time.perf_counter() - start
    tables = {part: posterior.tabulate(task.data[part], GRID) for part in PARTS}
    kinds = {
        "": {"per_layer": True},
        ", one prior": {},
        ", temperature": {"per_layer": True, "temperature": True},
    }
    for suffix, how in kinds.items() if targets == "experts" else [("", kinds[""])]:
        choice = tables["held"].choose(**how)
        record.add(
            name + suffix,
            {part: tables[part].probabilities(choice).cpu() for part in TESTS},
            prior_variance=[GRID[i] for i in choice.variances],
            temperature=choice.temperature,
            determined=determined(posterior, [GRID[i] for i in choice.variances]),
            training_nll=-posterior.log_likelihood / posterior.examples,
            experts_without_tokens=sum(map(len, posterior.unrouted.values())),
            fit_seconds=seconds,
        )


def determined(posterior: Posterior, prior_variance: list[float]) -> list[float]:
    """How many numbers of each layer the data determine more than the prior does: tr(s² F (I + s² F)⁻¹), MacKay's γ."""
    found = []
    for layer, s in zip(posterior.layers, prior_variance, strict=True):
        variance = torch.tensor(s, dtype=torch.float64, device=layer.tap.weight.device, requires_grad=True)
        (slope,) = torch.autograd.grad(layer.log_det(variance), variance)
        found.append(s * float(slope))
    return found


def summary(rows: list[dict[str, Any]]) -> str:
    """The table over seeds, and which goals are reached."""
    columns = {
        "accuracy": ("test", "accuracy"), "NLL": ("test", "nll"), "ECE": ("test", "ece"), "Brier": ("test", "brier"),
        "other: acc.": ("other", "accuracy"), "other: NLL": ("other", "nll"), "other: ECE": ("other", "ece"),
        "OOD AUROC": ("ood_auroc",),
    }  # fmt: skip

    def values(name: str, path: tuple[str, ...]) -> list[float]:
        found = []
        for row in rows:
            value: Any = row[name]
            for key in path:
                value = value[key]
            found.append(value)
        return found

    lines = [f"{'':25s} " + " ".join(f"{title:>15s}" for title in columns)]
    names = [name for name in rows[0] if all(name in row for row in rows)]
    for name in names:
        cells = []
        for path in columns.values():
            numbers = values(name, path)
            spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
            cells.append(f"{statistics.fmean(numbers):.4f} ±{spread:.4f}")
        lines.append(f"{name:25s} " + " ".join(f"{cell:>15s}" for cell in cells))
    mean = {name: {title: statistics.fmean(values(name, path)) for title, path in columns.items()} for name in names}
    ours, plain, tempered = mean["Bayesian-MoE"], mean["MAP"], mean["temperature"]
    changed = ", ".join(f"{sum(row['Bayesian-MoE'][key] for row in rows)} answers {key}" for key in ("gained", "lost"))
    goals = {
        f"ECE at least halved against MAP ({plain['ECE'] / ours['ECE']:.2f} times)": ours["ECE"] <= plain["ECE"] / 2,
        "NLL lower than MAP": ours["NLL"] < plain["NLL"],
        "NLL lower than MAP on text of another kind": ours["other: NLL"] < plain["other: NLL"],
        f"accuracy within 0.3 points ({100 * (ours['accuracy'] - plain['accuracy']):+.2f}; {changed})": (
            abs(ours["accuracy"] - plain["accuracy"]) <= 0.003
        ),
        "NLL on text of another kind lower than temperature scaling's": ours["other: NLL"] < tempered["other: NLL"],
    }
    return "\n".join([*lines, ""] + [f"{'reached' if met else 'MISSED '}  {goal}" for goal, met in goals.items()])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.bayesian_moe", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--task", choices=list(DEFAULTS), default="lines")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the seeds' files, and of the pretrained model"
    )
    parser.add_argument("--seeds", type=int, nargs="*", help="which seeds; none: the table alone")
    parser.add_argument("--prepare", action="store_true", help="make questions and the pretrained model, and no more")
    parser.add_argument("--train", type=int, help="questions to train on")
    parser.add_argument("--test", type=int, help="questions of each test set")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--pretraining", type=int, help="steps of 65,536 tokens before the task (lines)")
    parser.add_argument(
        "--pretraining-seconds", type=float, default=float("inf"), help="and no longer than this (lines)"
    )
    parser.add_argument("--members", type=int, default=5, help="models of the ensemble")
    parser.add_argument("--only-members", type=int, nargs="+", metavar="N", help="train these models, and no more")
    parser.add_argument("--development", action="store_true", help="score other files, to try things (lines)")
    parser.add_argument("--rank", type=int, default=10)
    parser.add_argument("--no-lora", action="store_true", help="leave out Laplace-LoRA")
    parser.add_argument(
        "--quick", action="store_true", help="a trial of minutes: a tiny model, few questions; not the claim"
    )
    parser.add_argument("--json", type=Path, help="all complete seeds in one file")
    parser.add_argument("--picture", type=Path, help="reliability diagrams of the first seed")
    options = parser.parse_args(arguments)
    for name, value in DEFAULTS[options.task].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.quick:
        options.seeds, options.train, options.test, options.epochs, options.members = [0], 96, 48, 2, 2
        options.pretraining = 5
    options.out.mkdir(parents=True, exist_ok=True)
    if options.prepare or options.only_members:
        task = make_task(options)
        for number in options.only_members or []:
            logits_of_member(number, task, options)
        return 0
    missing = [seed for seed in options.seeds if not is_complete(seed, options)]
    if missing:
        task = make_task(options)
        for seed in missing:
            run_seed(seed, task, options)
    reports = [json.loads(file.read_text()) for file in sorted(options.out.glob("seed*.json"))]
    if not reports or any("Bayesian-MoE" not in report["methods"] for report in reports):
        print(f"{options.out}: there is no seed, or one without Bayesian-MoE's row")
        return 1
    for report in reports:
        if other := differing(reports[0]["settings"], report["settings"]):
            print(f"{options.out}: seeds {reports[0]['seed']} and {report['seed']} were run with another {other}")
            return 1
        if not report["complete"]:
            print(f"seed {report['seed']} is not complete: rows that it lacks are left out")
    print(summary([report["methods"] for report in reports]))
    if options.picture:
        tensors, _ = read_safetensors(file_of(options.out, reports[0]["seed"]).with_suffix(".safetensors"))
        draw_reliability(options.picture, {name: (tensors[name], tensors["labels"]) for name in PICTURED})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"claim": "bayesian_moe", "quick": options.quick, "seeds": reports}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
