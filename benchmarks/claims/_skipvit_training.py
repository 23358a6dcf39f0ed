"""Training of small classifiers, for claims of accuracy: on a GPU a whole step is one CUDA graph, which is ten times as fast as
launching the kernels of so small a model one by one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcore.training.images import Images

CHUNK = 16  # batches that are made at a time


class Step:
    """A training step: AdamW, the gradient clipped at 1, the learning rate a tensor."""

    def __init__(self, model: nn.Module, batch: int, data: Images, device: str):
        self.model, self.device = model.to(device).train(), device
        cuda = {"capturable": True, "fused": True} if device == "cuda" else {}
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=self.rate, weight_decay=0.05, **cuda)
        self.images = torch.zeros(batch, data.channels, data.size, data.size, device=device)
        self.labels = torch.zeros(batch, dtype=torch.long, device=device)
        self.loss = torch.zeros((), device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _run(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(self.images).logits, self.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def capture(self) -> None:
        """Makes a graph of the step as the model is now. Its trial steps have learning rate 0 and leave no trace."""
        if self.device != "cuda":
            return
        self.graph = None
        before = {id(t): t.clone() for t in self._state()}
        self.rate.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        for t in self._state():
            t.copy_(before[id(t)]) if id(t) in before else t.zero_()
        self.graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(self.graph):
            self._run()

    def _state(self) -> list[Tensor]:
        return [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]

    def __call__(self, images: Tensor, labels: Tensor, rate: float) -> None:
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.rate.fill_(rate)
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()


def train(
    model: nn.Module,
    data: Images,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    device: str,
    changes: dict[int, Callable[[], None]] | None = None,
    listener: Callable[[int, float], None] | None = None,
) -> None:
    """A linear warm-up over a tenth of the steps, then a cosine to zero.

    Args:
        changes: what to do to the model before these steps; the graph is made anew.
    """
    step = Step(model, batch, data, device)
    generator = torch.Generator(device=device).manual_seed(seed)
    changes = {0: lambda: None} | (changes or {})
    for i in range(steps):
        if i in changes:
            changes[i]()
            step.capture()
        if i % CHUNK == 0:
            images, labels = data.sample(CHUNK * batch, generator)
        part = slice(i % CHUNK * batch, (i % CHUNK + 1) * batch)
        progress = (i + 1) / steps
        rate = learning_rate * min(progress / 0.1, 0.5 + 0.5 * math.cos(math.pi * max(progress - 0.1, 0.0) / 0.9))
        step(images[part], labels[part], rate)
        if listener is not None and (i + 1) % max(steps // 10, 1) == 0:
            listener(i + 1, step.loss.item())
