"""Where a step of ViT-S/16 spends its time on a GPU, with and without skipping: microseconds by kind of kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.claims._skipvit_speed import Contender, name_of

# Names of kernels that belong to a kind; the first that fits counts.
KINDS = {
    "token movement": ("effcore",),
    "attention": ("sdpa", "flash", "fmha", "dot_do_o", "dq_to_16bits"),
    "patch embedding": ("conv", "nchwToNhwc", "nhwcToNchw"),
    "matrix products": ("nvjet", "gemm", "cutlass", "splitK"),
    "norms, activations, additions": ("triton",),
}


def kind_of(kernel: str) -> str:
    if kernel.startswith("triton"):  # named after what was fused, a convolution's bias among them
        return "norms, activations, additions"
    return next((kind for kind, parts in KINDS.items() if any(part in kernel for part in parts)), "other")


def summarise(kernels: Iterable[tuple[str, float]], steps: int) -> dict[str, float]:
    """Microseconds a step of each kind, from the names and microseconds of all kernels of some steps."""
    sums = dict.fromkeys([*KINDS, "other", "launches"], 0.0)
    for name, microseconds in kernels:
        sums[kind_of(name)] += microseconds / steps
        sums["launches"] += 1 / steps
    return sums


def measure(
    source: str,
    batch: int,
    setting: tuple,
    embeddings: Sequence[str],
    steps: int = 3,
    keep: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    torch.backends.cudnn.benchmark = True
    rows: list[dict] = []
    for embedding, skips in ((embedding, skips) for embedding in embeddings for skips in (None, setting)):
        contender = Contender(source, "cuda", batch, True, embedding, skips)
        for kind in ("train", "infer"):
            contender.seconds(kind, 5)
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                contender.seconds(kind, steps)
            kernels = [(e.name, e.time_range.elapsed_us()) for e in profiler.events() if e.device_type.name == "CUDA"]
            spent = summarise(kernels, steps)
            rows.append({"what": kind, "embedding": embedding, "model": name_of(skips), "microseconds": spent})
            print_row(rows[-1])
            keep(rows)
        del contender
    return rows


def print_row(row: dict) -> None:
    spent = "  ".join(f"{kind} {value:,.0f}" for kind, value in row["microseconds"].items())
    print(f"{row['what']:<6} {row['embedding']:<12} {row['model']:<20} {spent}", flush=True)
