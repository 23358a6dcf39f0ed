"""What a method finds and leaves as it was: the modes of a model's modules, and torch's generators of random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module has its own mode again. ``model.train(before)`` would put norms
    that were frozen on purpose into training."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """What is drawn inside leaves the generators of the CPU and of the model's GPUs where they were."""
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        yield
