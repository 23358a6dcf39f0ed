"""One run of SwiftLearn's claim: an arm, a peak of the learning rate, a seed."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
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
    # Why: what is due to the time of a visit taken out, other measures, weights of the loss, the opposite choice.
    "SwiftLearn, detrended": {"detrend": True},
    "SwiftLearn, probabilities": {"probabilities": True},
    "SwiftLearn, probabilities detrended": {"probabilities": True, "detrend": True},
    "SwiftLearn, measured in evaluation": {"recording": "evaluation"},
    "SwiftLearn, probabilities in evaluation": {"probabilities": True, "recording": "evaluation"},
    "SwiftLearn, reweighted": {"max_weight": 5.0},
    "the least change": {"opposite": True},
}


CLAIM = tuple(ARMS)[:5]


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

    def steps(self, arm: str) -> int:
        keep = 1.0 if arm == "all data" else 0.1
        return SwiftLearnSampler(self.samples, keep, epochs=self.epochs).total_steps(self.batch)

    def run(self, arm: str, peak: float, seed: int) -> Generator[None, None, dict]:
        """A step at each ``next``; returns the row of the result."""
        settings = {"keep": 0.1, "epochs": self.epochs, "seed": seed} | ARMS[arm]
        as_recorded = (lambda x: x.float().softmax(-1)) if settings.pop("probabilities", False) else torch.clone
        kind = Opposite if settings.pop("opposite", False) else SwiftLearnSampler
        torch.manual_seed(seed)
        sampler = kind(self.samples, **settings)
        total = self.steps(arm)
        model = Classifier(self.model, self.classes, self.layers).to(self.device).train()
        called = torch.compile(model, dynamic=False) if self.compiled else model
        ids, labels = self.data["train_ids"], self.data["train_labels"]
        weights = torch.ones(self.batch, device=self.device)

        def forward(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                logits = called(inputs["ids"])
            losses = F.cross_entropy(logits.float(), inputs["labels"], reduction="none")
            return (losses * inputs["weights"]).mean(), logits

        def score(chosen: Tensor) -> Tensor:
            model.eval()
            with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                logits = model(ids[chosen.to(self.device)])
            model.train()
            return as_recorded(logits)

        sampler.score_with(score, batch_size=1024)
        first = {"ids": ids[: self.batch], "labels": labels[: self.batch], "weights": weights}
        trainer = TrainStep(model, forward, first)
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
                _, logits = trainer(inputs, linear_decay(step, total, peak=peak))
                if sampler.wants_records:
                    sampler.record(there, as_recorded(logits))
                step += 1
                yield
        self._wait()
        seconds = time.perf_counter() - began
        row = {"arm": arm, "peak": peak, "seed": seed, "seconds": seconds, "steps": step, "selecting": selecting}
        row |= {split: self.accuracy(model, split) for split in ("validation", "test")}
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
            self.data[f"{split}_ids"].split(512), self.data[f"{split}_labels"].split(512), strict=True
        ):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                right += int((model(ids).argmax(-1) == labels).sum())
        return right / len(self.data[f"{split}_labels"])

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.current_stream().synchronize()
