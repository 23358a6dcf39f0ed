"""A family of one op, y = 2 x, whose cases can be right or wrong, and a clock that tells what it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.case import Call, CallCost, Candidate, Case, Floor, Settings, Work

DTYPES = (torch.float32,)


def double(x):
    return [x["x"] * 2]


def case(ours: Call = double, *peers: Candidate, name: str = "double", floor: Floor | None = None) -> Case:
    return Case(
        name=name,
        inputs=lambda: {"x": torch.randn(64, 64)},
        outputs=("y",),
        ours=Candidate("effcore", ours),
        peers=peers or (Candidate("torch", lambda x: [x["x"] + x["x"]]),),
        exact=lambda x: [x["x"].double() * 2],
        work=Work(bytes=2.0 * 64 * 64 * 4),
        floor=floor,
    )


def cases(settings: Settings) -> Iterator[Case]:
    yield case()


def calls(settings: Settings) -> Iterator[CallCost]:
    x = torch.ones(1)
    yield CallCost("add", lambda: x + x, lambda: None, {"sub": lambda: x - x}, limit=1e6)


class ScriptedClock:
    """Runs the call, and returns the seconds that belong to whichever candidate it turned out to be."""

    def __init__(self, seconds: Callable[[str, int], float]):
        self.seconds = seconds
        self.order: list[str] = []
        self.total = 0.0

    def candidate(self, name: str) -> Candidate:
        return Candidate(name, lambda x: self.order.append(name) or [])

    def __call__(self, call: Callable[[], Any]) -> float:
        call()
        name = self.order[-1]
        elapsed = self.seconds(name, self.order.count(name))
        self.total += elapsed
        return elapsed
