"""Convolutions of a bottleneck at its own channels and at those that 2x leaves: microseconds beside the roofline's.

It says where a variant of `speed` stays behind its prediction: a library's kernels are made for 64, 128 and 256 channels, and
at half of them they reach less of the bound than the dense layer does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.case import Work
from benchmarks.ops.lowrank_cuda import ceilings, times

# (channels, of the block, pixels a side, the dense width and ranks near half of the parameters)
STAGES = (
    (64, 256, 56, (64, 32, 40)),
    (128, 512, 28, (128, 64, 72)),
    (256, 1024, 14, (256, 128, 152)),
    (512, 2048, 7, (512, 256, 304)),
)


def layers(batch: int, plans: int | None, stem_only: bool = False) -> Iterator[dict[str, Any]]:
    """Forward, and the gradients of input and weight, of each.

    Args:
        batch: images.
        plans: so many of cuDNN's kernels are tried for each, 0 for all; or it chooses one itself.
    """
    if plans is not None:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, plans
    flush = torch.zeros(64 << 20, device="cuda")
    rates, _ = ceilings(flush)

    def convolution(features: int, out: int, size: int, side: int, stride: int = 1) -> dict[str, Any]:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda").bfloat16().to(memory_format=torch.channels_last)

        x, weight, pad = random(batch, features, side, side), random(out, features, size, size), size // 2 * (size % 2)
        y = F.conv2d(x, weight, stride=stride, padding=pad)
        dy = torch.randn_like(y)

        def backward(wanted: list[bool]) -> Any:
            where = ([stride, stride], [pad, pad], [1, 1], False, [0, 0], 1)
            return torch.ops.aten.convolution_backward(dy, x, weight, None, *where, wanted)

        ways = {
            "forward": lambda: F.conv2d(x, weight, stride=stride, padding=pad),
            "input": lambda: backward([True, False, False]),
            "weight": lambda: backward([False, True, False]),
        }
        flops = 2.0 * y.numel() * features * size * size
        work = Work(flops=flops, bytes=2.0 * (x.numel() + y.numel() + weight.numel()), dtype="bfloat16")
        row: dict[str, Any] = {"in": features, "out": out, "kernel": size, "side": side, "stride": stride}
        row["plans"] = plans
        row |= {"bound": 1e6 * rates.seconds(work)} | times(ways, flush)
        print(
            f"{size}x{size} {features:4} -> {out:4} on {side}x{side} stride {stride}: forward {row['forward']:6.1f} us "
            f"({row['bound'] / row['forward']:.0%} of the bound), input {row['input']:6.1f}, weight {row['weight']:6.1f}",
            flush=True,
        )
        return row

    # The stem: as it is, with images of more channels, and over squares of 2x2 pixels, padded (`speed`).
    for features, size, side, stride in ((3, 7, 224, 2), (4, 7, 224, 2), (8, 7, 224, 2), (16, 4, 115, 1)):
        yield convolution(features, 64, size, side, stride)
    if stem_only:
        return
    for _, wide, side, widths in STAGES:
        for rank in widths:
            yield convolution(rank, rank, 3, side)
            yield convolution(wide, rank, 1, side)
            yield convolution(rank, wide, 1, side)
    for _, _, side, widths in STAGES[1:]:
        for rank in widths:
            yield convolution(rank, rank, 3, 2 * side, 2)
