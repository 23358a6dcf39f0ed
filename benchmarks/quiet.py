"""Whether the machine is ours alone: on a shared one, rounds that others disturbed are thrown away."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def processor_seconds() -> tuple[float, float]:
    """Seconds since the start of the machine that all processors together were busy, and that they existed.

    Time that a hypervisor took for other guests counts as busy.
    """
    fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, idle, waiting, irq, softirq, steal = fields
    busy = user + nice + system + irq + softirq + steal
    tick = os.sysconf("SC_CLK_TCK")
    return busy / tick, (busy + idle + waiting) / tick


class Neighbours:
    """The share of the machine that processes other than this one took."""

    def __init__(
        self,
        machine: Callable[[], tuple[float, float]] = processor_seconds,
        own: Callable[[], float] = time.process_time,
    ):
        self._machine, self._own = machine, own
        self._busy, self._total = machine()
        self._mine = own()

    def share(self) -> float:
        """0 to 1, since the last call (or the construction)."""
        busy, total, mine = *self._machine(), self._own()
        others = (busy - self._busy) - (mine - self._mine)
        span = total - self._total
        self._busy, self._total, self._mine = busy, total, mine
        return min(max(others / span, 0.0), 1.0) if span > 0 else 0.0


class Quiet:
    """Decides whether the time since the last question was quiet.

    ``tolerance`` is the share of the machine that others may take; the kernel counts in hundredths of a second, so windows
    much shorter than a third of a second say little.
    """

    window = 0.3

    def __init__(self, tolerance: float = 0.06, neighbours: Neighbours | None = None):
        self._tolerance = tolerance
        self._neighbours = neighbours if neighbours is not None else Neighbours()

    def __call__(self) -> bool:
        return self._neighbours.share() <= self._tolerance


def quiet_for(device: str) -> Callable[[], bool]:
    """On a GPU the events time the device alone, which nobody else uses; elsewhere than on Linux nobody can say."""
    if device.startswith("cuda") or not Path("/proc/stat").exists():
        return lambda: True
    return Quiet()
