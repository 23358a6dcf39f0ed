"""Schedules of factors inside the Hugging Face Trainer; a file of its own, because importing transformers takes seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from effcore.methods.low_rank_callbacks import _Schedule


class ScheduleCallback(TrainerCallback):
    """Applies a schedule before each optimizer step."""

    def __init__(self, schedule: _Schedule):
        self.schedule = schedule

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs.get("optimizer")
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
        self.schedule.apply(kwargs["model"], state.global_step, state.epoch or 0.0, optimizer)

    on_train_begin = on_step_begin
