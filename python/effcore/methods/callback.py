"""A sharing schedule inside the Hugging Face Trainer; a file of its own, because importing transformers takes seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from effcore.methods.sharing import SharingSchedule


class ScheduleCallback(TrainerCallback):
    """Applies a schedule before each optimizer step. The Trainer's step is the schedule's, so a resumed run needs no more."""

    def __init__(self, schedule: SharingSchedule):
        self.schedule = schedule

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.schedule.apply(kwargs["model"], kwargs.get("optimizer"), state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.schedule.apply(kwargs["model"], kwargs.get("optimizer"), state.global_step)
