"""TTC-aware stopping inside the Hugging Face Trainer. Apart from the method, because importing transformers takes seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from effcore.methods._gather import Processes

if TYPE_CHECKING:
    from effcore.methods.ttc import TTCEarlyStopping


class TTCCallback(TrainerCallback):
    """Checks every ``every`` steps. All processes evaluate (a sharded model runs in all of them or not at all) and stop
    together."""

    def __init__(self, stopper: TTCEarlyStopping, every: int, tokens_per_step: float):
        if every < 1:
            raise ValueError(f"effcore.TTCCallback: every must be positive, got {every}")
        if not tokens_per_step > 0:
            raise ValueError(f"effcore.TTCCallback: tokens_per_step must be positive, got {tokens_per_step}")
        self.stopper, self.every, self.tokens_per_step = stopper, every, tokens_per_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        decision = self.stopper.check(kwargs["model"], state.global_step * self.tokens_per_step)
        if Processes().maximum(int(decision.stop)):
            control.should_save = control.should_training_stop = True
