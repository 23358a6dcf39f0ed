"""What a benchmark is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Call = Callable[[Inputs], Sequence[Tensor]]


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case's outputs. ``context`` is entered around each run, outside the timed region."""

    name: str
    call: Call
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Work:
    """What our candidate must do at least: floating-point operations at a dtype's matmul rate, or bytes to move."""

    flops: float = 0.0
    bytes: float = 0.0
    dtype: str = "float32"


@dataclass(frozen=True)
class Floor:
    """The least ratio that the project asks for, against the best peer whose name starts with ``against``."""

    ratio: float
    against: str = ""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: unique in its family.
        inputs: makes a set of inputs, on ``settings.device``. Random, never zeros.
        outputs: names of the outputs, in order.
        peers: the first is also the same-dtype PyTorch computation that bounds our error.
        exact: the outputs in float64.
        note: what a planner chose for this case, and why; stands below the table.
    """

    name: str
    inputs: Callable[[], Inputs]
    outputs: tuple[str, ...]
    ours: Candidate
    peers: tuple[Candidate, ...]
    exact: Call
    work: Work
    floor: Floor | None = None
    note: str = ""


@dataclass(frozen=True)
class CallCost:
    """Microseconds that a call costs on the host, on a problem so small that its kernel costs next to nothing.

    ``limit`` bounds ours; ``below`` is what lies under ours (the same work one layer down), subtracted in the table.
    """

    name: str
    ours: Callable[[], Any]
    below: Callable[[], Any] | None = None
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    limit: float | None = None


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    device: str = "cpu"
    quick: bool = False
    compiled: bool = True  # peers through torch.compile as well

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


def copy_inputs(inputs: Inputs) -> Inputs:
    """The same numbers, strides and requires_grad in other memory."""
    return {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in inputs.items()}


def bytes_of(inputs: Inputs) -> int:
    return sum(t.numel() * t.element_size() for t in inputs.values())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
