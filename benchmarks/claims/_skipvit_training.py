"""Many small classifiers trained side by side, for claims of accuracy.

On a GPU each has a stream of its own and its whole step is one CUDA graph: a model as small as these fills a few percent of the
GPU, and its kernels take less time than their launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcore.training.images import Images

CHUNK = 16  # batches that are made at a time


@dataclass
class Run:
    """A model to train, and the seed of its data. ``changes`` are done to the model before these steps."""

    name: str
    model: nn.Module
    seed: int
    changes: dict[int, Callable[[], Any]]


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


class Step:
    """A training step: AdamW, the gradient clipped at 1, the learning rate a tensor."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor):
        self.model, self.cuda = model.to(images.device).train(), images.is_cuda
        settings: dict[str, Any] = {"capturable": True, "fused": True} if self.cuda else {}
        self.rate = torch.zeros((), device=images.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=self.rate, weight_decay=0.05, **settings)
        self.images, self.labels = torch.zeros_like(images), torch.zeros_like(labels)
        self.loss = torch.zeros((), device=images.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream() if self.cuda else None

    def run(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(logits(self.model(self.images)), self.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def capture(self) -> None:
        """Makes a graph of the step as the model is now. Its trial steps have learning rate 0 and leave no trace."""
        if self.stream is None:
            return
        before = {id(t): t.clone() for t in self._state()}
        self.rate.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.run()
        torch.cuda.synchronize()
        for t in self._state():
            if id(t) in before:
                t.copy_(before[id(t)])
            else:
                t.zero_()
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.run()
        torch.cuda.synchronize()

    def _state(self) -> list[Tensor]:
        return [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]

    def __call__(self, images: Tensor, labels: Tensor, rate: float) -> None:
        with torch.cuda.stream(self.stream):  # None: where there are no streams
            self.images.copy_(images)
            self.labels.copy_(labels)
            self.rate.fill_(rate)
            if self.graph is None:
                self.run()
            else:
                self.graph.replay()


def _wait(streams: Iterable[Any], for_others: bool) -> None:
    """The current stream for these streams, or these for it."""
    for stream in filter(None, streams):
        current = torch.cuda.current_stream()
        (current.wait_stream(stream) if for_others else stream.wait_stream(current))


def train_together(
    runs: list[Run],
    data: Images,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    device: str,
    listener: Callable[[int, list[float]], None] | None = None,
) -> None:
    """Runs with the same seed see the same batches. The learning rate rises over a tenth of the steps and falls as a cosine."""
    generators = {run.seed: torch.Generator(device=device).manual_seed(run.seed) for run in runs}
    batches: dict[int, tuple[Tensor, Tensor]] = {}
    trained: list[Step] = []
    for i in range(steps):
        if i % CHUNK == 0:
            _wait((step.stream for step in trained), for_others=True)
            batches = {seed: data.sample(CHUNK * batch, g) for seed, g in generators.items()}
            if not trained:
                part = {seed: [t[:batch] for t in made] for seed, made in batches.items()}
                trained = [Step(run.model, *part[run.seed]) for run in runs]
            _wait((step.stream for step in trained), for_others=False)
        for run, step in zip(runs, trained, strict=True):
            if i in run.changes or i == 0:
                run.changes.get(i, lambda: None)()
                step.capture()
        at = slice(i % CHUNK * batch, (i % CHUNK + 1) * batch)
        progress = (i + 1) / steps
        rate = learning_rate * min(progress / 0.1, 0.5 + 0.5 * math.cos(math.pi * max(progress - 0.1, 0.0) / 0.9))
        for run, step in zip(runs, trained, strict=True):
            images, labels = batches[run.seed]
            step(images[at], labels[at], rate)
        if listener is not None and (i + 1) % max(steps // 10, 1) == 0:
            _wait((step.stream for step in trained), for_others=True)
            listener(i + 1, [step.loss.item() for step in trained])
    _wait((step.stream for step in trained), for_others=True)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 1000) -> float:
    """The share of the images whose class the model names."""
    model.eval()
    parts = zip(images.split(batch), labels.split(batch), strict=True)
    return sum(int((logits(model(x)).argmax(-1) == y).sum()) for x, y in parts) / len(labels)
