"""Progress on standard error: of a training run a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


def lines(label: str, seconds: float = 5.0) -> Callable[..., None]:
    """A function of (what, done, total, note) that prints ``label: what done/total`` every so many seconds, and at the end."""
    last = [time.monotonic() - seconds]

    def show(what: str, done: int, total: int | None, note: str = "") -> None:
        if done == total or time.monotonic() - last[0] >= seconds:
            last[0] = time.monotonic()
            of = f"/{total}" if total else ""
            print(f"{label}: {what} {done}{of}{note and ' · '}{note}", file=sys.stderr, flush=True)

    return show


class TrainingProgress:
    """Shows the rows that a run writes to metrics.jsonl."""

    def __init__(self, label: str, *, quiet: bool = False):
        self.label, self.quiet = label, quiet
        self.console = Console(stderr=True)
        self.validation: float | None = None
        self._last_line = 0.0
        self._total = 0
        self._bar: Progress | None = None
        if not quiet and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task(label, total=None, numbers="preparing model and text")

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def begin(self, done: int, total: int) -> None:
        """The run is about to train from step ``done`` to ``total``."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, numbers="")

    def update(self, row: dict[str, Any]) -> None:
        if self.quiet:
            return
        if row["kind"] == "validation":
            self.validation = row["loss"]
            return
        numbers = f"loss {row['loss']:.3f}"
        if self.validation is not None:
            numbers += f" · validation {self.validation:.3f}"
        numbers += f" · {row['tokens_per_second']:,.0f} tokens/s"
        if row.get("shared_layers"):
            numbers += f" · {row['shared_layers']} layers share {row['mode']}"
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], numbers=numbers)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES or row["step"] == self._total:
            self._last_line = time.monotonic()
            print(f"{self.label}: step {row['step']}/{self._total} · {numbers}", file=sys.stderr, flush=True)
