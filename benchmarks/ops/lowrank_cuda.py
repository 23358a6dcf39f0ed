"""`lowrank_linear` on a GPU over a grid of shapes and ranks, against two products of cuBLAS and against the dense layer.

`python benchmarks/ops/lowrank_cuda.py [--json FILE]`. bfloat16, forward, and forward with all gradients. Times are a GPU's
alone: work is queued behind a pause, so that launches hide; the L2 cache is cold. Beside them the bound: the larger of what the
bytes (x, factors, out; x, out's gradient, x's gradient) take at the copy rate and the operations at a large product's rate,
both measured here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]

from benchmarks import ceilings  # noqa: E402
from benchmarks.case import Work  # noqa: E402
from benchmarks.run import use_carried_libraries  # noqa: E402

SHAPES = ((768, 3072), (3072, 768), (2048, 5632), (5632, 2048), (4096, 4096), (768, 768))
RANKS = (32, 64, 128, 192, 256)
ROWS = (1024, 2048, 4096, 8192, 16384, 65536)
ROUNDS = 9


def times(ways: dict[str, Callable[[], Any]], flush: Tensor) -> dict[str, float]:
    """Median microseconds of each, alternating."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(ROUNDS + 2):
        for name, call in ways.items():
            flush.zero_()
            torch.cuda._sleep(300_000)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if round_ > 1:
                taken[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(values) for name, values in taken.items()}


def case(
    rows: int, features: int, rank: int, out: int, rates: ceilings.Ceilings, flush: Tensor
) -> list[dict[str, Any]]:
    from effcore.ops.lowrank import lowrank_linear

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, device="cuda") * scale).bfloat16().requires_grad_()

    x, bias = random(rows, features), random(out)
    down, up = random(rank, features, scale=features**-0.5), random(out, rank, scale=rank**-0.5)
    weight, dout = random(out, features, scale=features**-0.5), torch.randn(rows, out, device="cuda").bfloat16()
    layers: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "effcore": (lambda: lowrank_linear(x, down, up, bias), [x, down, up, bias]),
        "two": (lambda: F.linear(F.linear(x, down), up, bias), [x, down, up, bias]),
        "dense": (lambda: F.linear(x, weight, bias), [x, weight, bias]),
    }
    flops, factors = 2.0 * rows * rank * (features + out), 2.0 * rank * (features + out)
    once, again = 2.0 * rows * (features + out) + factors, 2.0 * rows * (2 * features + out) + 2 * factors

    def forward(layer: Callable[[], Tensor]) -> Callable[[], Any]:
        return torch.no_grad()(layer)

    def both(layer: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(layer(), leaves, dout)

    result = []
    for what, ways, size, work in (
        ("forward", {name: forward(layer) for name, (layer, _) in layers.items()}, once, flops),
        ("forward and backward", {name: both(*layer) for name, layer in layers.items()}, once + again, 3 * flops),
    ):
        bound = 1e6 * rates.seconds(Work(flops=work, bytes=size, dtype="bfloat16"))
        row = {"what": what, "rows": rows, "in": features, "rank": rank, "out": out, "bound": bound}
        result.append(row | times(ways, flush))
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the numbers")
    options = parser.parse_args(arguments)
    use_carried_libraries()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    rates = ceilings.measure("cuda", [torch.bfloat16])
    print(f"copy {rates.copy / 1e12:.2f} TB/s, product {rates.matmul['bfloat16'] / 1e12:.0f} TFLOP/s")
    table: list[dict[str, Any]] = []
    for features, out in SHAPES:
        for rank in RANKS:
            if 2 * rank * (features + out) > features * out * 2:
                continue
            for rows in ROWS:
                for row in case(rows, features, rank, out, rates, flush):
                    table.append(row)
                    print(
                        f"{row['what']:21} M={rows:6} {features:4}->{out:4} r={rank:3}  effcore {row['effcore']:7.1f} us  "
                        f"two {row['two']:7.1f} ({row['two'] / row['effcore']:.2f}x)  dense {row['dense']:7.1f} "
                        f"({row['dense'] / row['effcore']:.2f}x)  {row['bound'] / row['effcore']:.0%} of the bound",
                        flush=True,
                    )
        if options.json:
            report = {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "copy_bytes_s": rates.copy,
                "product_flops_s": rates.matmul["bfloat16"],
                "rows": table,
            }
            options.json.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
