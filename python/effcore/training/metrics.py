"""The callback that writes ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from effcore.errors import RunError
from effcore.training.metrics_file import Row


class MetricsCallback(TrainerCallback):
    """Appends rows to ``metrics.jsonl`` and passes each on to ``listener`` (the progress display).

    Args:
        tokens_per_step: of all processes together.
        describe: what to say about the model beside losses and speed (layout, cache bytes a token), asked for at each row.
        rows: of the run so far, where it resumes.
    """

    def __init__(
        self,
        path: Path,
        tokens_per_step: int,
        describe: Callable[[], Row],
        rows: list[Row],
        listener: Callable[[Row], None] | None = None,
    ):
        self.path, self.tokens_per_step, self.describe, self.listener = path, tokens_per_step, describe, listener
        trained = [row for row in rows if row["kind"] == "train"]
        self.seconds = trained[-1]["seconds"] if trained else 0.0
        self._window_seconds = 0.0
        self._window_steps = 0
        self._began = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = True
        if control.should_log and torch.cuda.is_available():
            torch.cuda.synchronize()
        self._window_seconds += time.perf_counter() - self._began
        self._window_steps += 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Row | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or not self._window_steps:
            return
        self.seconds += self._window_seconds
        self._write(
            state,
            kind="train",
            loss=logs["loss"],
            **({"distillation": logs["distillation"]} if logs.get("distillation") else {}),
            gradient_norm=logs.get("grad_norm"),
            learning_rate=logs["learning_rate"],
            tokens_per_second=self._window_steps * self.tokens_per_step / max(self._window_seconds, 1e-9),
        )
        self._window_seconds, self._window_steps = 0.0, 0
        if not math.isfinite(logs["loss"]):
            raise RunError(
                f"training diverged: the loss is {logs['loss']} at step {state.global_step}; "
                "start again with a lower training.learning_rate and --overwrite"
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Row | None = None,
        **kwargs: Any,
    ) -> None:
        if metrics and "eval_loss" in metrics:
            accuracy = {"accuracy": metrics["eval_accuracy"]} if "eval_accuracy" in metrics else {}
            self._write(state, kind="validation", loss=metrics["eval_loss"], **accuracy)

    def _write(self, state: TrainerState, **values: Any) -> None:
        if not state.is_world_process_zero:
            return
        row = {
            **values,
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "seconds": round(self.seconds, 3),
            **self.describe(),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.listener is not None:
            self.listener(row)
