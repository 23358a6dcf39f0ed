"""The runs of SwiftLearn's claim: an arm, a peak of the learning rate, a seed.

Arms that differ only behind the warm-up may share it (:class:`WarmUp`): their differences are then their own, and they cost a
third. Runs that are timed go from beginning to end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.claims._snippets import Classifier
from benchmarks.claims._step import TrainStep, linear_decay
from effcore.methods import importance
from effcore.methods.swiftlearn import SwiftLearnSampler


@dataclass(frozen=True)
class Arm:
    """Settings of the sampler; what is recorded of the logits; how the learning rate falls; the opposite choice."""

    sampler: dict[str, Any] = field(default_factory=dict)
    probabilities: bool = False
    by_epochs: bool = False
    opposite: bool = False

    def recorded(self, logits: Tensor) -> Tensor:
        return logits.float().softmax(-1) if self.probabilities else logits

    def measures(self) -> bool:
        """Whether changes are measured by forward passes in evaluation mode."""
        return self.sampler.get("recording") == "evaluation"


FULL = "all data"
ARMS = {
    FULL: Arm({"keep": 1.0}),
    "all data, as many steps": Arm({"keep": 1.0}),
    "random subset": Arm({"select": "random"}),
    "SwiftLearn": Arm(),
    "SwiftLearn, fixed subset": Arm({"select": "topk"}),
    "SwiftLearn, detrended": Arm({"detrend": True}),
    # The learning rate falls by epochs, not by steps: late, over the short ones.
    "all data, as many steps, rate by epochs": Arm({"keep": 1.0}, by_epochs=True),
    "random subset, rate by epochs": Arm({"select": "random"}, by_epochs=True),
    "SwiftLearn, rate by epochs": Arm(by_epochs=True),
    # Within the method: a milder preference, changes measured again by what training records, weights of the loss.
    "SwiftLearn, sigma 0.3": Arm({"sigma": 0.3}),
    "SwiftLearn, visits refresh": Arm({"refresh_every": 1, "refresh": "visited"}),
    "SwiftLearn, reweighted": Arm({"max_weight": 5.0}),
    # Other measures of a change, and the opposite choice.
    "SwiftLearn, probabilities": Arm(probabilities=True),
    "SwiftLearn, probabilities detrended": Arm({"detrend": True}, probabilities=True),
    "SwiftLearn, measured in evaluation": Arm({"recording": "evaluation"}),
    "SwiftLearn, probabilities in evaluation": Arm({"recording": "evaluation"}, probabilities=True),
    "the least change": Arm(opposite=True),
}
CLAIM = tuple(ARMS)[:6]


class Opposite(SwiftLearnSampler):
    """Prefers the samples whose outputs moved least."""

    def _drawn(self, epoch: int) -> Tensor:
        if epoch == self.warmup_epochs:
            self._changes.share()
            self._changes.change = -usual(self)[1]
            self.detrend = False
        return super()._drawn(epoch)


def usual(sampler: SwiftLearnSampler) -> tuple[Tensor, Tensor]:
    """What the warm-up recorded, as it is and detrended."""
    last = (sampler.warmup_epochs - 2, sampler.warmup_epochs - 1)
    change = sampler._changes.change
    return change, importance.detrended(change, [sampler._places(epoch) for epoch in last])


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

    def go_on(self, warm: WarmUp, seed: int) -> None:
        torch.manual_seed(seed + 1)
        self.trainer.reset(warm.weights)
        self.trainer.set_moments(warm.moments)
        self.model.train()


@dataclass
class WarmUp:
    """What the epochs on all samples leave behind, for the arms that share them."""

    weights: dict[str, Tensor]
    moments: list[Tensor]
    recorded: list[tuple[Tensor, Tensor]]  # (samples, logits) of each step
    evaluated: list[Tensor]  # after each of its epochs the logits of all samples in evaluation mode, where asked for

    def tell(self, sampler: SwiftLearnSampler, arm: Arm) -> None:
        """The sampler learns what it would have recorded."""
        for ids, logits in self.recorded:
            if sampler.wants_records:
                sampler.record(ids, arm.recorded(logits))
        for epoch, logits in enumerate(self.evaluated, start=1):
            sampler.score_with(arm.recorded(logits).__getitem__, batch_size=1024)
            sampler.order(epoch)


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
        timed: bool,
    ):
        held = dict(np.load(tokens))
        chosen = np.random.default_rng(0).permutation(len(held["train_ids"]))[:most]
        held |= {name: held[name][chosen] for name in ("train_ids", "train_labels")}
        self.data = {n: torch.from_numpy(held[n].astype(np.int64)).to(device) for n in held if n != "classes"}
        self.classes = len(held["classes"])
        self.model, self.device, self.batch, self.epochs, self.layers = model, device, batch, epochs, layers
        self.compiled, self.timed = compiled, timed
        # Whole batches in every epoch of every arm: a step of another shape is no CUDA graph and takes as long as ten.
        self.samples = len(self.data["train_ids"]) // (10 * batch) * 10 * batch or len(self.data["train_ids"])

    @cached_property
    def learner(self) -> Learner:
        return Learner(self)

    def steps(self, arm: str) -> int:
        keep = 1.0 if arm == FULL else 0.1
        return SwiftLearnSampler(self.samples, keep, epochs=self.epochs).total_steps(self.batch)

    def by_epochs(self, peak: float) -> Callable[[int], float]:
        """Linear warm-up as ever, then down by the same in each epoch of a run that keeps a tenth."""
        sampler = SwiftLearnSampler(self.samples, 0.1, epochs=self.epochs)
        first = max(round(0.05 * sampler.total_steps(self.batch)), 1)

        def left(step: int) -> float:
            return 1 - sampler.progress(step, self.batch)

        return lambda step: peak * min((step + 1) / first, left(step) / left(first))

    def _sampler(self, name: str, seed: int) -> SwiftLearnSampler:
        kind = Opposite if ARMS[name].opposite else SwiftLearnSampler
        return kind(self.samples, **{"keep": 0.1, "epochs": self.epochs, "seed": seed, **ARMS[name].sampler})

    def _rate(self, name: str, peak: float) -> Callable[[int], float]:
        if ARMS[name].by_epochs:
            return self.by_epochs(peak)
        return partial(linear_decay, total=self.steps(name), peak=peak)

    def _step(self, there: Tensor, rate: float, weights: Tensor) -> Tensor:
        inputs = {"ids": self.data["train_ids"][there], "labels": self.data["train_labels"][there], "weights": weights}
        return self.learner.trainer(inputs, rate)[1]

    def _logits(self, ids: Tensor) -> Tensor:
        """Of samples of the training split, in evaluation mode."""
        model = self.learner.model.eval()
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            logits = model(self.data["train_ids"][ids.to(self.device)])
        model.train()
        return logits

    def warm_up(self, name: str, peak: float, seed: int, *, evaluate: bool) -> WarmUp:
        """The epochs on all samples of an arm, which are the same for all with its schedule."""
        sampler, rate, ones = self._sampler("SwiftLearn", seed), self._rate(name, peak), self._ones()
        self.learner.begin(seed)
        recorded: list[tuple[Tensor, Tensor]] = []
        evaluated = []
        for epoch in range(sampler.warmup_epochs):
            for there in sampler.order(epoch).to(self.device).split(self.batch):
                recorded.append((there, self._step(there, rate(len(recorded)), ones).clone()))
            if evaluate:
                everyone = torch.arange(self.samples).split(1024)
                evaluated.append(torch.cat([self._logits(ids) for ids in everyone]).cpu())
        weights = {name: tensor.clone() for name, tensor in self.learner.model.state_dict().items()}
        return WarmUp(weights, [t.clone() for t in self.learner.trainer.moments()], recorded, evaluated)

    def run(self, name: str, peak: float, seed: int, *, trial: bool, warm: WarmUp | None = None) -> dict[str, Any]:
        """The row of the result, without the test split where it is a trial; from the beginning, or behind a warm-up."""
        arm, total, sampler, rate = ARMS[name], self.steps(name), self._sampler(name, seed), self._rate(name, peak)
        began, selecting, step, noted = time.perf_counter(), 0.0, 0, {}
        if warm is None:
            self.learner.begin(seed)
            sampler.score_with(lambda ids: arm.recorded(self._logits(ids)), batch_size=1024)
            self._wait()
            began = time.perf_counter()
        else:
            self.learner.go_on(warm, seed)
            warm.tell(sampler, arm)
            step = len(warm.recorded)
        weights = self._ones()
        for epoch in range(0 if warm is None else sampler.warmup_epochs, self.epochs):
            if step == total:
                break
            if self.timed:
                self._wait()  # so that drawing is not charged for the steps before it
            elif epoch == sampler.warmup_epochs and sampler.keep < 1:
                sampler._changes.share()
                noted = self.describe(sampler)
            before = time.perf_counter()
            order = sampler.order(epoch)
            selecting += time.perf_counter() - before
            if noted and "right_drawn" not in noted:
                noted |= self.describe_drawn(order)
            # At once: a copy for each step would wait for the step.
            for there in order.to(self.device).split(self.batch)[: total - step]:
                if sampler.max_weight is not None:
                    weights = sampler.weights(there)
                logits = self._step(there, rate(step), weights)
                if sampler.wants_records:
                    sampler.record(there, arm.recorded(logits.clone()))
                step += 1
        self._wait()
        seconds = time.perf_counter() - began
        row = {"arm": name, "peak": peak, "seed": seed, "steps": step}
        row |= {split: self.accuracy(split) for split in ("validation", "test")[: 1 if trial else 2]}
        row |= {"alone": True, "seconds": seconds, "selecting": selecting} if self.timed else {"alone": False, **noted}
        print(json.dumps(row), flush=True)
        return row

    def _ones(self) -> Tensor:
        return torch.ones(self.batch, device=self.device)

    def describe(self, sampler: SwiftLearnSampler) -> dict[str, Any]:
        """Of what the warm-up recorded: the share of the variance of log ‖ΔP‖² that is due to when samples were visited."""
        if sampler.select == "random" or sampler.recording == "evaluation":
            return {"explained_by_time": None}
        logs = [part.clamp(min=1e-12).log() for part in usual(sampler)]
        return {"explained_by_time": 1 - (logs[1].var() / logs[0].var()).item()}

    def describe_drawn(self, order: Tensor) -> dict[str, Any]:
        """Of the first samples drawn: how many the model has right, and the shares of the rarest and commonest class."""
        labels = self.data["train_labels"]
        classes = labels[order.to(self.device)].bincount(minlength=self.classes) / len(order)

        def right(chosen: Tensor) -> float:
            found = [self._logits(ids).argmax(-1) == labels[ids.to(self.device)] for ids in chosen.split(1024)]
            return torch.cat(found).float().mean().item()

        return {
            "right_all": right(torch.arange(0, self.samples, 10)),
            "right_drawn": right(order),
            "classes_drawn": [classes.min().item(), classes.max().item()],
        }

    @torch.no_grad()
    def accuracy(self, split: str) -> float:
        model, right = self.learner.model.eval(), 0
        parts = (self.data[f"{split}_{name}"].split(2048) for name in ("ids", "labels"))
        for ids, labels in zip(*parts, strict=True):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                right += int((model(ids).argmax(-1) == labels).sum())
        model.train()
        return right / len(self.data[f"{split}_labels"])

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
