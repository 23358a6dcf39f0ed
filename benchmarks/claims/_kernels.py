"""The kernels that a GPU ran, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

Kernel = tuple[str, float, float]  # name, start and end in microseconds


def traced(run: Callable[[], Any]) -> list[Kernel]:
    """The kernels of a call, which ends synchronised."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]


def of_a_step(steps: Callable[[int], Any], count: int) -> list[tuple[str, float, float]]:
    """The kernels of one step, of ``count`` that are run: name, launches and microseconds, the longest first."""
    sums: dict[str, list[float]] = {}
    for name, start, end in traced(lambda: steps(count)):
        of_name = sums.setdefault(name[:120], [0.0, 0.0])
        of_name[0] += 1 / count
        of_name[1] += (end - start) / count
    found = ((name, launches, microseconds) for name, (launches, microseconds) in sums.items())
    return sorted(found, key=lambda kernel: -kernel[2])
