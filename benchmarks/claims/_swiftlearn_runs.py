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
from effcore.methods.swiftlearn import SwiftLearnSampler

ARMS: dict[str, dict[str, Any]] = {  # name: settings of the sampler; "short": ends where keep = 0.1 would
    "all data": {"keep": 1.0},
    "SwiftLearn": {},
    "random subset": {"select": "random"},
    "SwiftLearn, fixed subset": {"select": "topk"},
    "all data, as many steps": {"keep": 1.0, "short": True},
    "SwiftLearn, detrended": {"detrend": True},
    "SwiftLearn, measured in evaluation": {"recording": "evaluation"},
    "SwiftLearn, reweighted": {"max_weight": 5.0},
    "least change": {"detrend": True, "flip": True},
    "SwiftLearn, probabilities": {"probabilities": True},
    "SwiftLearn, probabilities detrended": {"probabilities": True, "detrend": True},
    "SwiftLearn, probabilities in evaluation": {"probabilities": True, "recording": "evaluation"},
}


class Detrended(SwiftLearnSampler):
    flip = False

    def _drawn(self, epoch):
        if epoch == self.warmup_epochs:
            self._share()
            self._change = detrended(self._change, self.places())
            if self.flip:
                self._change = -self._change
        return super()._drawn(epoch)

    def places(self):
        found = []
        for epoch in (self.warmup_epochs - 2, self.warmup_epochs - 1):
            order = self.order(epoch)
            places = torch.empty_like(order)
            places[order] = torch.arange(len(order))
            found.append(places)
        return found


def detrended(change, places, blocks=50):
    change = change.clone()
    for _ in range(2):
        for place in places:
            block = place * blocks // len(change)
            known = ~change.isnan()
            total = torch.zeros(blocks).index_add_(0, block[known], change[known])
            count = torch.zeros(blocks).index_add_(0, block[known], torch.ones(int(known.sum())))
            change /= (total / count.clamp(min=1)).clamp(min=1e-30)[block]
    return change


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
    ):
        held = dict(np.load(tokens))
        chosen = np.random.default_rng(0).permutation(len(held["train_ids"]))[:most]
        held |= {name: held[name][chosen] for name in ("train_ids", "train_labels")}
        self.data = {n: torch.from_numpy(held[n].astype(np.int64)).to(device) for n in held if n != "classes"}
        self.classes = len(held["classes"])
        self.model, self.device, self.batch, self.epochs, self.layers = model, device, batch, epochs, layers
        self.compiled = compiled
        # Whole batches in every epoch of every arm: a step of another shape is no CUDA graph and takes as long as ten.
        self.samples = len(self.data["train_ids"]) // (10 * batch) * 10 * batch or len(self.data["train_ids"])

    def steps(self, arm: str) -> int:
        keep = 1.0 if arm == "all data" else 0.1
        return SwiftLearnSampler(self.samples, keep, epochs=self.epochs).total_steps(self.batch)

    def run(self, arm: str, peak: float, seed: int) -> Generator[None, None, dict]:
        """A step at each ``next``; returns the row of the result."""
        settings = {"keep": 0.1, "epochs": self.epochs, "seed": seed} | ARMS[arm]
        settings.pop("short", None)
        as_recorded = (lambda x: x.float().softmax(-1)) if settings.pop("probabilities", False) else torch.clone
        kind = Detrended if settings.pop("detrend", False) else SwiftLearnSampler
        flip = settings.pop("flip", False)
        torch.manual_seed(seed)
        sampler = kind(self.samples, **settings)
        sampler.flip = flip
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
        began, selecting, step, notes = time.perf_counter(), 0.0, 0, {}
        for epoch in range(self.epochs):
            before = time.perf_counter()
            order = sampler.order(epoch)
            selecting += time.perf_counter() - before
            if epoch == sampler.warmup_epochs and sampler.keep < 1 and not self.quiet:
                notes = self.describe(sampler, model, order)
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
        row |= {split: self.accuracy(model, split) for split in ("validation", "test")} | notes
        print(json.dumps(row), flush=True)
        return row

    quiet = False

    def describe(self, sampler, model, order) -> dict:
        """Of the importances at the first draw."""
        found = {
            "right_all": self._right(model, torch.arange(0, self.samples, 10)),
            "right_drawn": self._right(model, order),
        }
        labels = self.data["train_labels"][order.to(self.device)].bincount(minlength=self.classes)
        found |= {"classes_drawn": [labels.min().item() / len(order), labels.max().item() / len(order)]}
        if sampler.select == "random" or sampler.recording == "evaluation":
            return found
        change = sampler._change.clone()
        log = change.clamp(min=1e-12).log()
        left = detrended(change, Detrended.places(sampler)).clamp(min=1e-12).log()
        return found | {
            "explained_by_time": 1 - (left.var() / log.var()).item(),
            "deviation": (change.std() / change.mean()).item(),
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
