"""What a training step of a model costs, forward and backward apart.

Several models are timed in turns, so that a machine that is busy is busy for all of them.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StepCost:
    """Medians over the rounds. ``backward_share`` is the gradients' part of forward and backward together."""

    forward_seconds: float
    backward_seconds: float
    tokens: int

    @property
    def backward_share(self) -> float:
        """The gradients' part of forward and backward together, 0 to 1."""
        return self.backward_seconds / (self.forward_seconds + self.backward_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of forward and backward, without the optimizer."""
        return self.tokens / (self.forward_seconds + self.backward_seconds)


def step_costs(
    models: Mapping[str, Any], batch: Mapping[str, torch.Tensor], *, rounds: int = 5, bfloat16: bool = False
) -> dict[str, StepCost]:
    """The cost of a forward and a backward of each model on one batch, medians of ``rounds`` after one that warms up.

    The models stay in the state that they had: training mode, and no gradients.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            measured = _once(model, batch, bfloat16)
            if number > 0:
                times[name].append(measured)
    tokens = batch["input_ids"].numel()
    return {
        name: StepCost(statistics.median(f for f, _ in pairs), statistics.median(b for _, b in pairs), tokens)
        for name, pairs in times.items()
    }


def _once(model: Any, batch: Mapping[str, torch.Tensor], bfloat16: bool) -> tuple[float, float]:
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    autocast = torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()
    training = model.training
    model.train()
    began = _now(device)
    with autocast:
        loss = model(**inputs, use_cache=False).loss
    middle = _now(device)
    loss.backward()
    ended = _now(device)
    model.zero_grad(set_to_none=True)
    model.train(training)
    return middle - began, ended - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
