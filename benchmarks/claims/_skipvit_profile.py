"""Where a step of ViT-S/16 spends its time on a GPU: microseconds of each kernel, and by kind of kernel."""

from __future__ import annotations

from collections.abc import Iterable

# Names of kernels that belong to a kind; the first that fits counts.
KINDS = {
    "scores and movement": ("effcore",),
    "attention": ("sdpa", "flash", "fmha", "dot_do_o", "dq_to_16bits"),
    "convolution": ("conv", "nchwToNhwc", "nhwcToNchw"),
    "matrix products": ("nvjet", "gemm", "cutlass", "splitK"),
    "GELU": ("gelu",),
    "norms, additions, lookups": ("triton",),
}


def kind_of(kernel: str) -> str:
    kinds = (
        {kind: KINDS[kind] for kind in ("GELU", "norms, additions, lookups")} if kernel.startswith("triton") else KINDS
    )
    return next((kind for kind, parts in kinds.items() if any(part in kernel for part in parts)), "other")


def summarise(taken: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Microseconds of each kind, and how many launches."""
    sums = dict.fromkeys([*KINDS, "other", "launches"], 0.0)
    for name, launches, microseconds in taken:
        sums[kind_of(name)] += microseconds
        sums["launches"] += launches
    return sums


def print_row(row: dict) -> None:
    spent = "  ".join(f"{kind} {value:,.0f}" for kind, value in row["microseconds"].items())
    print(f"{row['what']:<6} {row['embedding']:<12} {row['model']:<20} {spent}", flush=True)
