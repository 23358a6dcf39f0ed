"""SkipViT's warm-up inside the Hugging Face Trainer. Apart from the method, because importing transformers takes seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from effcore.methods.skipvit import SkipWarmup


class WarmupCallback(TrainerCallback):
    """Applies a warm-up before each optimizer step. The Trainer's step and epoch count, so a resumed run needs no more."""

    def __init__(self, warmup: SkipWarmup):
        self.warmup = warmup

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.warmup.apply(kwargs["model"], state.global_step, state.epoch or 0.0)

    on_train_begin = on_step_begin
