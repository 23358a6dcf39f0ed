"""One run of SwiftLearn's claim: an arm, a peak of the learning rate, a seed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.claims._snippets import Classifier
from benchmarks.claims._step import TrainStep, linear_decay
from effcore.methods import importance
from effcore.methods.swiftlearn import SwiftLearnSampler

ARMS: dict[str, dict[str, Any]] = {  # name: settings of the sampler, and of the run
    "all data": {"keep": 1.0},
    "all data, as many steps": {"keep": 1.0},
    "random subset": {"select": "random"},
    "SwiftLearn": {},
    "SwiftLearn, fixed subset": {"select": "topk"},
    "SwiftLearn, detrended": {"detrend": True},
    # The learning rate falls by epochs, not by steps: late, over the short ones.
    "all data, as many steps, rate by epochs": {"keep": 1.0, "by_epochs": True},
    "random subset, rate by epochs": {"select": "random", "by_epochs": True},
    "SwiftLearn, rate by epochs": {"by_epochs": True},
    # Within the method: a milder preference, changes measured again by what training records, weights of the loss.
    "SwiftLearn, sigma 0.3": {"sigma": 0.3},
    "SwiftLearn, visits refresh": {"refresh_every": 1, "refresh": "visited"},
    "SwiftLearn, reweighted": {"max_weight": 5.0},
    # Other measures of a change, and the opposite choice.
    "SwiftLearn, probabilities": {"probabilities": True},
    "SwiftLearn, probabilities detrended": {"probabilities": True, "detrend": True},
    "SwiftLearn, measured in evaluation": {"recording": "evaluation"},
    "SwiftLearn, probabilities in evaluation": {"probabilities": True, "recording": "evaluation"},
    "the least change": {"opposite": True},
}


CLAIM = tuple(ARMS)[:6]


class Opposite(SwiftLearnSampler):
    """Prefers the samples whose outputs moved least."""

    def _drawn(self, epoch: int) -> Tensor:
        if epoch == self.warmup_epochs:
            self._share()
            self._change = -usual(self)[1]
            self.detrend = False
        return super()._drawn(epoch)


def usual(sampler: SwiftLearnSampler) -> tuple[Tensor, Tensor]:
    """What the warm-up recorded, as it is and detrended."""
    last = (sampler.warmup_epochs - 2, sampler.warmup_epochs - 1)
    return sampler._change, importance.detrended(sampler._change, [sampler._places(epoch) for epoch in last])


class Learner:
    """A model and its training step, which serve one run after another: compiled and captured once."""

    def __init__(self, task: Task):
        self.model = Classifier(task.model, task.classes, task.layers).to(task.device).train()
        self.weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        called = torch.compile(self.model, dynamic=False) if task.compiled else self.model

        def forward(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.autocast(task.device, torch.bfloat16, enabled=task.device == "cuda"):
                logits = called(inputs["ids"])
            losses = F.cross_entropy(logits.float(), inputs["labels"], reduction="none")
            return (losses * inputs["weights"]).mean(), logits

        ids, labels = task.data["train_ids"][: task.batch], task.data["train_labels"][: task.batch]
        example = {"ids": ids, "labels": labels, "weights": torch.ones(task.batch, device=task.device)}
        self.trainer = TrainStep(self.model, forward, example)

    def begin(self, seed: int) -> None:
        """The encoder as it was and a new last layer."""
        torch.manual_seed(seed)
        head = torch.nn.Linear(self.model.head.in_features, self.model.head.out_features)
        self.trainer.reset(self.weights | {f"head.{name}": tensor for name, tensor in head.state_dict().items()})
        self.model.train()


class Task:
    """Tokens on the device, and what an arm does with them."""

    def __init__(
        self,
        tokens: Path,
        model: Path,
        device: str,
        *,
        batch: int,
        epochs: int,
        layers: int | None,
        most: int | None,
        compiled: bool,
        alone: bool,
    ):
        held = dict(np.load(tokens))
        chosen = np.random.default_rng(0).permutation(len(held["train_ids"]))[:most]
        held |= {name: held[name][chosen] for name in ("train_ids", "train_labels")}
        self.data = {n: torch.from_numpy(held[n].astype(np.int64)).to(device) for n in held if n != "classes"}
        self.classes = len(held["classes"])
        self.model, self.device, self.batch, self.epochs, self.layers = model, device, batch, epochs, layers
        self.compiled, self.alone = compiled, alone
        # Whole batches in every epoch of every arm: a step of another shape is no CUDA graph and takes as long as ten.
        self.samples = len(self.data["train_ids"]) // (10 * batch) * 10 * batch or len(self.data["train_ids"])

    def learner(self) -> Learner:
        return Learner(self)

    def steps(self, arm: str) -> int:
        keep = 1.0 if arm == "all data" else 0.1
        return SwiftLearnSampler(self.samples, keep, epochs=self.epochs).total_steps(self.batch)

    def by_epochs(self, peak: float) -> Callable[[int], float]:
        """Linear warm-up as ever, then down by the same in each epoch of a run that keeps a tenth."""
        sizes = SwiftLearnSampler(self.samples, 0.1, epochs=self.epochs).epoch_sizes()
        ends = np.cumsum([0, *(-(-size // self.batch) for size in sizes)])
        first = max(round(0.05 * int(ends[-1])), 1)

        def left(step: int) -> float:
            return 1 - float(np.interp(step, ends, np.arange(self.epochs + 1))) / self.epochs

        return lambda step: peak * min((step + 1) / first, left(step) / left(first))

    def run(self, arm: str, peak: float, seed: int, learner: Learner, *, tuning: bool) -> Generator[None, None, dict]:
        """A step at each ``next``; returns the row of the result, without the test split where it is a trial."""
        settings = {"keep": 0.1, "epochs": self.epochs, "seed": seed} | ARMS[arm]
        as_recorded = (lambda x: x.float().softmax(-1)) if settings.pop("probabilities", False) else torch.clone
        kind = Opposite if settings.pop("opposite", False) else SwiftLearnSampler
        total = self.steps(arm)
        rate = (
            self.by_epochs(peak) if settings.pop("by_epochs", False) else partial(linear_decay, total=total, peak=peak)
        )
        sampler = kind(self.samples, **settings)
        learner.begin(seed)
        model, trainer = learner.model, learner.trainer
        ids, labels = self.data["train_ids"], self.data["train_labels"]
        weights = torch.ones(self.batch, device=self.device)

        def score(chosen: Tensor) -> Tensor:
            model.eval()
            with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                logits = model(ids[chosen.to(self.device)])
            model.train()
            return as_recorded(logits)

        sampler.score_with(score, batch_size=1024)
        yield
        self._wait()
        began, selecting, step, noted = time.perf_counter(), 0.0, 0, {}
        for epoch in range(self.epochs):
            if step == total:
                break
            if self.alone:
                self._wait()  # so that drawing is not charged for the steps before it
            elif epoch == sampler.warmup_epochs and sampler.keep < 1:
                sampler._share()
                noted = self.describe(sampler)
            before = time.perf_counter()
            order = sampler.order(epoch)
            selecting += time.perf_counter() - before
            if noted and "right_drawn" not in noted:
                noted |= self.describe_drawn(model, order)
            # At once: a copy for each step would wait for the step.
            for there in order.to(self.device).split(self.batch):
                if step == total:
                    break
                if sampler.max_weight is not None:
                    weights = sampler.weights(there)
                inputs = {"ids": ids[there], "labels": labels[there], "weights": weights}
                _, logits = trainer(inputs, rate(step))
                if sampler.wants_records:
                    sampler.record(there, as_recorded(logits))
                step += 1
                yield
        self._wait()
        seconds = time.perf_counter() - began
        row = {"arm": arm, "peak": peak, "seed": seed, "seconds": seconds, "steps": step, "selecting": selecting}
        row |= {split: self.accuracy(model, split) for split in ("validation", "test")[: 1 if tuning else 2]}
        row |= {"alone": self.alone} | noted
        print(json.dumps(row), flush=True)
        return row

    def describe(self, sampler: SwiftLearnSampler) -> dict[str, Any]:
        """Of what the warm-up recorded: the share of the variance of log ‖ΔP‖² that is due to when samples were visited."""
        if sampler.select == "random" or sampler.recording == "evaluation":
            return {"explained_by_time": None}
        logs = [part.clamp(min=1e-12).log() for part in usual(sampler)]
        return {"explained_by_time": 1 - (logs[1].var() / logs[0].var()).item()}

    def describe_drawn(self, model: nn.Module, order: Tensor) -> dict[str, Any]:
        """Of the first samples drawn: how many the model has right, and the shares of the rarest and commonest class."""
        labels = self.data["train_labels"][order.to(self.device)].bincount(minlength=self.classes) / len(order)
        return {
            "right_all": self._right(model, torch.arange(0, self.samples, 10)),
            "right_drawn": self._right(model, order),
            "classes_drawn": [labels.min().item(), labels.max().item()],
        }

    def _right(self, model, chosen) -> float:
        model.eval()
        right = 0
        with torch.no_grad():
            for there in chosen.to(self.device).split(1024):
                with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                    right += int(
                        (model(self.data["train_ids"][there]).argmax(-1) == self.data["train_labels"][there]).sum()
                    )
        model.train()
        return right / len(chosen)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, split: str) -> float:
        model.eval()
        right = 0
        for ids, labels in zip(
            self.data[f"{split}_ids"].split(2048), self.data[f"{split}_labels"].split(2048), strict=True
        ):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                right += int((model(ids).argmax(-1) == labels).sum())
        return right / len(self.data[f"{split}_labels"])

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.current_stream().synchronize()
