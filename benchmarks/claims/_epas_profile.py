"""Where a step of EPAS spends its time on a GPU: microseconds a step by kernel and by kind of kernel, and how long the GPU
waited in between. `python -m benchmarks.claims.epas profile`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.claims._kernels import Kernel, traced

# Names of kernels that belong to a kind; the first that fits counts.
KINDS = {
    "attention": ("effcore", "sdpa", "flash", "fmha"),
    "optimizer": ("multi_tensor_apply", "adam"),
    "matrix products": ("nvjet", "gemm", "cutlass", "splitK"),
    "cache writes": ("index_copy", "indexCopy", "index_elementwise", "index_put"),
    "fused by the compiler": ("triton",),
}


def kind_of(kernel: str) -> str:
    if kernel.startswith("triton"):  # named after what was fused
        return "fused by the compiler"
    return next((kind for kind, parts in KINDS.items() if any(part in kernel for part in parts)), "other")


def summarise(kernels: Iterable[Kernel], steps: int) -> dict[str, Any]:
    """Of all kernels of some steps: microseconds a step by kind and by name (with launches), and those in which none ran."""
    kinds = dict.fromkeys([*KINDS, "other"], 0.0)
    names: dict[str, dict[str, float]] = {}
    idle, done = 0.0, float("nan")
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        kinds[kind_of(name)] += (end - start) / steps
        row = names.setdefault(name, {"microseconds": 0.0, "launches": 0.0})
        row["microseconds"] += (end - start) / steps
        row["launches"] += 1 / steps
        if start > done:
            idle += (start - done) / steps
        done = end if done != done else max(done, end)
    ordered = dict(sorted(names.items(), key=lambda item: -item[1]["microseconds"]))
    return {"kinds": kinds, "idle": idle, "kernels": ordered}


def measure(step: Callable[[], Any], steps: int = 3, warm_up: int = 3) -> dict[str, Any]:
    """The summary of some calls of ``step``."""
    for _ in range(warm_up):
        step()
    torch.cuda.synchronize()

    def some() -> None:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()

    return summarise(traced(some), steps)


def describe(title: str, found: dict[str, Any], most: int = 16) -> str:
    """A table: kinds, then the kernels that take longest."""
    whole = sum(found["kinds"].values()) + found["idle"]
    lines = [f"{title}: {whole:,.0f} us a step"]
    for kind, value in {**found["kinds"], "idle": found["idle"]}.items():
        lines.append(f"  {value:10,.0f} us  {value / whole:6.1%}  {kind}")
    for name, row in list(found["kernels"].items())[:most]:
        lines.append(f"    {row['microseconds']:10,.0f} us  {row['launches']:6.0f} x  {name[:110]}")
    return "\n".join(lines)
