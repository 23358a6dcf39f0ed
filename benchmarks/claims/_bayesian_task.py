"""A task of Bayesian-MoE's claim: questions in parts that share no file, models that learn them, and their logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def all_labels(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([batch["labels"] for batch in batches])


@dataclass
class Task:
    """
    Attributes:
        data: batches of "fit" (the training data, for posteriors), "held" (to choose temperatures and priors), "test" and
            "other", text of another kind.
        member: a trained model, by its seed.
        adapted: the model of this seed, with low-rank adapters trained in place of its weights.
        logits_of: [B, classes] of a model and a batch.
        answers: token ids of the classes, where the model is a language model.
        about: what a reader of the result should know of data and models.
    """

    data: dict[str, list[Batch]]
    member: Callable[[int], Any]
    adapted: Callable[[Any, int], Any]
    logits_of: Callable[[Any, Batch], Tensor]
    answers: Sequence[int] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def logits(self, model: Any, part: str) -> Tensor:
        return torch.cat([self.logits_of(model, batch) for batch in self.data[part]]).cpu()

    def dropout(self, model: Any, part: str, passes: int = 10) -> Tensor:
        """MC dropout: the mean of the softmax over forward passes with dropout on."""
        model.train()
        mean = torch.stack([self.logits(model, part).softmax(1) for _ in range(passes)]).mean(0)
        model.eval()
        return mean

    def labels(self, part: str) -> Tensor:
        return all_labels(self.data[part])
