"""Times that can be compared: alternating runs, cold caches, medians.

All candidates of a case run in turn in one process. A round runs each of them once, on the next of many equal sets of
inputs, together larger than the last-level cache; the order turns from round to round. A machine that slows down slows
every candidate of the round, so the ratio of two candidates is the median of the rounds' ratios. Rounds in which other
processes were busy are thrown away where there are others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.case import Candidate, Inputs, bytes_of, copy_inputs
from benchmarks.quiet import Quiet


@dataclass(frozen=True)
class Quartiles:
    """Of one candidate's times in seconds, or of a ratio's rounds."""

    q1: float
    median: float
    q3: float
    count: int

    @property
    def spread(self) -> float:
        """The interquartile range over the median."""
        return (self.q3 - self.q1) / self.median if self.median else 0.0


def quartiles(values: Sequence[float]) -> Quartiles:
    """Linear interpolation between the sorted values, as numpy.quantile does."""
    if not values:
        raise ValueError("quartiles of no values")
    ordered = sorted(values)

    def at(fraction: float) -> float:
        position = fraction * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return Quartiles(at(0.25), at(0.5), at(0.75), len(ordered))


@dataclass(frozen=True)
class Timings:
    """Seconds of each candidate that ran, round by round; ``quiet`` is False where other processes disturbed too many rounds
    to do without them."""

    rounds: Sequence[Mapping[str, float]]
    quiet: bool = True

    def of(self, name: str) -> Quartiles:
        return quartiles([r[name] for r in self.rounds if name in r])

    def ratio(self, ours: str, peer: str) -> Quartiles:
        """How many times as fast we are: the peer's time over ours, round by round."""
        return quartiles([r[peer] / r[ours] for r in self.rounds if peer in r and ours in r])


class Clock(Protocol):
    def __call__(self, call: Callable[[], Any]) -> float:
        """Runs ``call`` and returns its seconds."""
        ...


class CpuClock:
    def __call__(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class CudaClock:
    """Time on the device between two events, behind a cold L2.

    The device first clears a buffer larger than the L2 and then sleeps, while the host enqueues: what is measured is the
    kernels and not the host's launching them, which :class:`~benchmarks.case.CallCost` measures.
    """

    def __init__(self, sleep_cycles: int = 2_000_000):
        self._flush = torch.empty(2 * cache_bytes("cuda"), dtype=torch.uint8, device="cuda")
        self._sleep_cycles = sleep_cycles

    def __call__(self, call: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        torch.cuda._sleep(self._sleep_cycles)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def clock_for(device: str) -> Clock:
    return CudaClock() if device.startswith("cuda") else CpuClock()


def cache_bytes(device: str) -> int:
    """The last-level cache: L2 of the GPU, the largest of the processor's."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes)


def input_sets(inputs: Inputs, device: str, *, most_bytes: int = 1 << 30) -> list[Inputs]:
    """As many copies as fill the last-level cache twice, at least two, but not more than ``most_bytes`` of them."""
    size = max(bytes_of(inputs), 1)
    count = min(-(-2 * cache_bytes(device) // size), most_bytes // size, 256)
    return [inputs, *(copy_inputs(inputs) for _ in range(max(count, 2) - 1))]


def interleave(
    candidates: Mapping[str, Candidate],
    sets: Sequence[Inputs],
    clock: Clock,
    *,
    seconds: float,
    patience: float = 0.0,
    least: int = 5,
    most: int = 200,
    warm_up: int = 2,
    trial: int = 2,
    hopeless: float = 3.0,
    quiet: Callable[[], bool] = lambda: True,
    window: float = Quiet.window,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Any] = time.sleep,
) -> Timings:
    """Runs the candidates in turn.

    Rounds go on for ``seconds``, but at least ``least`` and at most ``most`` of them. They are gathered in windows: one in
    which others disturbed us, as ``quiet()`` says, is thrown away, and we sleep until one passes quietly, ``patience`` seconds
    in all. When those are spent and there are fewer than ``least`` quiet rounds, the disturbed ones count as well.

    A candidate that in each of the first ``trial`` rounds took more than ``hopeless`` times as long as the fastest one ever
    did is not run again: its times stay.
    """
    taken = 0

    def run(candidate: Candidate) -> float:
        nonlocal taken
        inputs = sets[taken % len(sets)]
        taken += 1
        with candidate.context():
            return clock(lambda: candidate.call(inputs))

    for candidate in candidates.values():
        for _ in range(warm_up):
            run(candidate)
    running, number = list(candidates), 0
    rounds: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    spent = lost = 0.0
    quiet()  # begins the first window
    while len(rounds) < most and (len(rounds) < least or spent < seconds) and lost <= patience:
        start = now()
        gathered: list[dict[str, float]] = []
        while not gathered or (now() - start < window and len(rounds) + len(gathered) < most):
            turn = number % len(running)
            gathered.append({name: run(candidates[name]) for name in running[turn:] + running[:turn]})
            number += 1
        elapsed = now() - start
        if quiet():
            rounds += gathered
            spent += elapsed
        else:
            disturbed += gathered
            lost += elapsed
            while lost <= patience:
                sleep(window)
                lost += window
                if quiet():
                    break
        if len(rounds) >= trial:
            running = _hopeful(running, rounds[:trial], hopeless)
    enough = len(rounds) >= min(least, most)
    return Timings(rounds if enough else rounds + disturbed, enough)


def _hopeful(names: Sequence[str], rounds: Sequence[Mapping[str, float]], hopeless: float) -> list[str]:
    fastest = min(max(r[name] for r in rounds) for name in names)
    return [name for name in names if min(r[name] for r in rounds) <= hopeless * fastest]


def microseconds_a_call(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    repeats: int = 300,
    synchronize: Callable[[], Any] | None = None,
) -> dict[str, Quartiles]:
    """What calls cost on the host, in microseconds: batches of ``repeats`` calls, alternating."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            if synchronize is not None:
                synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            if number:  # the first round warms up
                times[name].append((time.perf_counter() - start) / repeats * 1e6)
    return {name: quartiles(values) for name, values in times.items()}
