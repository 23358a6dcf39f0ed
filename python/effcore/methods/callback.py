"""Schedules inside the Hugging Face Trainer; a file of its own, because importing transformers takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EachStep(TrainerCallback):
    """Calls ``change(model, state, optimizer)`` when training begins and before each optimizer step.

    Step and epoch are the Trainer's (``state.global_step``, ``state.epoch``), so a resumed run needs no more. The optimizer is
    the user's, not what Accelerate makes of it. ``end(model)`` is called when training ends.
    """

    def __init__(self, change: Callable[[Any, TrainerState, Any], object], end: Callable[[Any], object] | None = None):
        self.change, self.end = change, end

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs.get("optimizer")
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        self.change(kwargs["model"], state, optimizer)

    on_train_begin = on_step_begin

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.end is not None:
            self.end(kwargs["model"])
