"""A plain training loop for image classifiers, and their accuracy: what `effcore train skipvit` and its claims run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcore.errors import RunError
from effcore.methods._surroundings import evaluating
from effcore.methods.skipvit import SkipWarmup


class Images(Protocol):
    """Where batches come from: :class:`effcore.data.cluttered_digits.ClutteredDigits` and others."""

    classes: int
    channels: int
    size: int

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Images [count, channels, size, size] and labels [count]."""
        ...


def small_vit(data: Images, *, patch: int = 8, width: int = 96, blocks: int = 6, **changes: Any) -> nn.Module:
    """A Hugging Face ViT for these images, with random weights."""
    import transformers

    settings = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": width // 32,
        "intermediate_size": 2 * width,
        "image_size": data.size,
        "patch_size": patch,
        "num_channels": data.channels,
        "num_labels": data.classes,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return transformers.ViTForImageClassification(transformers.ViTConfig(**(settings | changes)))


def train_classifier(
    model: nn.Module,
    data: Images,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: str = "cpu",
    warmup: SkipWarmup | None = None,
    listener: Callable[[int, float], None] | None = None,
) -> float:
    """AdamW with a one-cycle schedule; returns images a second, data and the first tenth of the steps left out.

    Raises:
        RunError: the loss is no longer a number.
    """
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    seconds, counted = 0.0, 0
    for step in range(steps):
        images, labels = (t.to(device) for t in data.sample(batch_size, generator))
        start = time.perf_counter()
        if warmup is not None:
            warmup.apply(model, step=step)
        loss = F.cross_entropy(model(images).logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        value = loss.item()  # also waits for the device, so that the time is the step's
        if step >= steps // 10:
            seconds, counted = seconds + time.perf_counter() - start, counted + batch_size
        if value != value:
            raise RunError(f"step {step}: the loss is not a number; a lower learning rate may help")
        if listener is not None:
            listener(step, value)
    return counted / seconds if seconds else 0.0


def accuracy(model: nn.Module, data: Images, *, count: int = 4000, device: str = "cpu", batch_size: int = 200) -> float:
    """The share of ``count`` images, the same in every call, whose class the model names."""
    generator, right, seen = torch.Generator().manual_seed(10_000), 0, 0
    with evaluating(model):
        while seen < count:
            images, labels = (t.to(device) for t in data.sample(min(batch_size, count - seen), generator))
            right += int((model(images).logits.argmax(-1) == labels).sum())
            seen += len(labels)
    return right / seen
