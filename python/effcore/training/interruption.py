"""Ctrl-C (or SIGTERM) in the middle of training: the step is finished, a checkpoint written, and only then the run stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Interruption(TrainerCallback):
    """Turns the first signal into a checkpoint and an orderly end; a second Ctrl-C ends the program at once."""

    def __init__(self) -> None:
        self.requested = False
        self.stopped_at: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles SIGINT and SIGTERM inside the block (in the main thread; elsewhere signals stay as they are)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._any_process(args) and state.global_step < state.max_steps:
            control.should_log = control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step

    def _any_process(self, args: TrainingArguments) -> bool:
        """All processes must stop after the same step, though the signal reaches them at different ones."""
        if args.world_size == 1:
            return self.requested
        flag = torch.tensor(int(self.requested), device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
