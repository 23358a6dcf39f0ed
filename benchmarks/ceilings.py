"""What this machine reaches at best, measured here: a large matrix product for each dtype, and a large copy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.case import Work, dtype_name
from benchmarks.timing import cache_bytes, clock_for


@dataclass(frozen=True)
class Ceilings:
    """``matmul``: FLOP/s by dtype name; ``copy``: bytes/s, those read and those written together."""

    matmul: dict[str, float]
    copy: float

    def or_better(self, other: Ceilings) -> Ceilings:
        """The better of two measurements: a busy moment must not lower a ceiling."""
        return Ceilings(
            {name: max(rate, other.matmul[name]) for name, rate in self.matmul.items()}, max(self.copy, other.copy)
        )

    def seconds(self, work: Work) -> float:
        """The least time for this work: the slower of arithmetic and memory."""
        flops = work.flops / self.matmul[work.dtype] if work.flops and work.dtype in self.matmul else 0.0
        return max(flops, work.bytes / self.copy)


def measure(device: str, dtypes: Iterable[torch.dtype], *, rounds: int = 7) -> Ceilings:
    """The best of ``rounds`` runs: a ceiling is not an average. Random data, for zeros multiply faster."""
    clock = clock_for(device)
    n = 8192 if device.startswith("cuda") else 2048
    matmul = {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        product, flops = partial(torch.mm, a, b, out=torch.empty_like(a)), 2.0 * n**3
        if device == "cpu":
            # torch may have no fast product for float16: a small one shows that in milliseconds, this one in minutes.
            small, few = partial(torch.mm, a[:256, :256], b[:256, :256]), 2.0 * 256**3
            small()
            if clock(small) * flops / few > 1:
                product, flops = small, few
        matmul[dtype_name(dtype)] = flops / min(clock(product) for _ in range(rounds + 1))
    size = min(max(4 * cache_bytes(device), 256 << 20), 1 << 30)
    source = torch.randint(0, 127, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    best = min(clock(lambda: target.copy_(source)) for _ in range(rounds + 1))
    return Ceilings(matmul, 2.0 * source.numel() * source.element_size() / best)
