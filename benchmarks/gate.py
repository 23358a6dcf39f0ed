"""The gate before the clock: a wrong result has no speed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Candidate, Case, Inputs


@dataclass(frozen=True)
class Verdict:
    """``errors``: for each output, ours and that of the same-dtype PyTorch computation, relative to the exact norm."""

    green: bool
    reason: str = ""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are filled with NaN, so that an element that a kernel forgets to write is seen."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def relative_error(got: Tensor, exact: Tensor) -> float:
    """‖got - exact‖ / ‖exact‖ in float64; NaN and infinities in ``got`` make it infinite."""
    difference = (got.detach().double() - exact).norm().item()
    error = difference / max(exact.norm().item(), 1e-300)
    return error if error == error else float("inf")


def compare(
    names: Sequence[str], got: Sequence[Tensor], same_dtype: Sequence[Tensor], exact: Sequence[Tensor]
) -> Verdict:
    """Green if each output's error is at most twice that of the same-dtype computation (and a rounding of the dtype)."""
    errors: dict[str, tuple[float, float]] = {}
    wrong = []
    if not len(names) == len(got) == len(same_dtype) == len(exact):
        return Verdict(False, f"{len(got)} outputs where {len(names)} were expected")
    for name, a, b, c in zip(names, got, same_dtype, exact, strict=True):
        if a.shape != c.shape:
            wrong.append(f"{name} has shape {tuple(a.shape)}, expected {tuple(c.shape)}")
            continue
        errors[name] = ours, theirs = relative_error(a, c), relative_error(b, c)
        allowed = 2 * theirs + (2 * torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0)
        if not ours <= allowed:
            wrong.append(f"{name} is off by {ours:.1e}, allowed {allowed:.1e}")
    return Verdict(not wrong, "; ".join(wrong), errors)


def run_once(candidate: Candidate, inputs: Inputs) -> list[Tensor]:
    with candidate.context():
        return list(candidate.call(inputs))


def judge(case: Case, inputs: Inputs) -> tuple[Verdict, tuple[Candidate, ...], dict[str, str]]:
    """Our verdict, the peers that work here, and why the others do not.

    A peer that raises is not available; one that is far off (a hundredth of the norm, or ten times the first peer's error)
    computes something else and is left out as well.
    """
    exact = [t.double() for t in case.exact(inputs)]
    working: list[Candidate] = []
    absent: dict[str, str] = {}
    same_dtype: list[Tensor] | None = None
    bound = 0.0
    for peer in case.peers:
        try:
            got = run_once(peer, inputs)
        except Exception as error:
            absent[peer.name] = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            )
            continue
        worst = max(relative_error(a, b) for a, b in zip(got, exact, strict=True))
        if same_dtype is None:
            same_dtype, bound = got, max(10 * worst, 1e-2)
        if not worst <= bound:
            absent[peer.name] = f"wrong result: off by {worst:.1e}"
            continue
        working.append(peer)
        del got
    if same_dtype is None:
        return Verdict(False, "no peer works here, so there is nothing to bound the error with"), (), absent
    try:
        with poisoned_memory():
            ours = run_once(case.ours, inputs)
    except Exception as error:
        return Verdict(False, f"{type(error).__name__}: {error}"), tuple(working), absent
    return compare(case.outputs, ours, same_dtype, exact), tuple(working), absent
