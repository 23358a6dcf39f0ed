"""`lowrank_linear` on a GPU over a grid of shapes and ranks, against two products of cuBLAS and against the dense layer.

`python benchmarks/ops/lowrank_cuda.py [--json FILE]`. bfloat16, forward, and forward with all gradients. Each way is a CUDA
graph of its own, so that no time is one of launching; the L2 cache holds other data, which need not be written back. Beside
them the bound: the larger of what the bytes (x, factors, out; x, out's gradient, x's gradient) take at the copy rate and the
operations at a large product's rate, both measured here; and the rate of a fill, for most of these bytes are written.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path = [str(ROOT), *sys.path, str(ROOT / "python")]  # an installed effcore, with its libraries, before the sources

from benchmarks.case import Work  # noqa: E402
from benchmarks.ceilings import Ceilings  # noqa: E402
from benchmarks.run import use_carried_libraries  # noqa: E402

SHAPES = ((768, 3072), (3072, 768), (2048, 5632), (5632, 2048), (4096, 4096), (768, 768))
RANKS = (32, 64, 128, 192, 256)
ROWS = (1024, 2048, 4096, 8192, 16384, 65536)
# (rows, in, rank, out) of the 1x1 convolutions of ResNet-50 at 2x, 256 images
POINTWISE = (
    (802816, 64, 24, 256),
    (802816, 256, 24, 64),
    (802816, 256, 40, 128),
    (200704, 128, 48, 512),
    (200704, 512, 48, 128),
    (200704, 512, 88, 256),
    (50176, 256, 104, 1024),
    (50176, 1024, 104, 256),
    (50176, 1024, 168, 512),
    (12544, 512, 208, 2048),
    (12544, 2048, 208, 512),
)
ROUNDS = 9


def graph_of(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Its result with it: that memory must stay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def times(ways: dict[str, Callable[[], Any]], flush: Tensor) -> dict[str, float]:
    """Median microseconds of each, alternating; the first one changes, for a long product leaves a slower chip behind."""
    graphs = {name: graph_of(call) for name, call in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    names = list(graphs)
    for i in range(ROUNDS):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            graph, _ = graphs[name]
            flush.sum()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(values) for name, values in taken.items()}


def ceilings(flush: Tensor) -> tuple[Ceilings, float]:
    """A large product's rate and a copy's, and a fill's bytes a second; as graphs, since a busy host is slow to launch."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    to = torch.empty_like(flush)
    t = times({"product": lambda: a @ b, "copy": lambda: to.copy_(flush), "fill": to.zero_}, flush)
    product, copy = 2 * 8192.0**3 / t["product"] * 1e6, 2 * flush.nbytes / t["copy"] * 1e6
    return Ceilings({"bfloat16": product}, copy), flush.nbytes / t["fill"] * 1e6


def case(
    rows: int, features: int, rank: int, out: int, rates: Ceilings, flush: Tensor, gradients: bool, biased: bool = True
) -> list[dict[str, Any]]:
    from effcore.ops.lowrank import lowrank_linear

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, device="cuda") * scale).bfloat16().requires_grad_()

    x, bias = random(rows, features), random(out) if biased else None
    down, up = random(rank, features, scale=features**-0.5), random(out, rank, scale=rank**-0.5)
    weight, dout = random(out, features, scale=features**-0.5), torch.randn(rows, out, device="cuda").bfloat16()
    extra = [bias] if bias is not None else []
    layers: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "effcore": (lambda: lowrank_linear(x, down, up, bias), [x, down, up, *extra]),
        "two": (lambda: F.linear(F.linear(x, down), up, bias), [x, down, up, *extra]),
        "dense": (lambda: F.linear(x, weight, bias), [x, weight, *extra]),
    }
    flops, factors = 2.0 * rows * rank * (features + out), 2.0 * rank * (features + out)
    once, again = 2.0 * rows * (features + out) + factors, 2.0 * rows * (2 * features + out) + 2 * factors

    def forward(layer: Callable[[], Tensor]) -> Callable[[], Any]:
        return torch.no_grad()(layer)

    def both(layer: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(layer(), leaves, dout)

    ways = {name: forward(layer) for name, (layer, _) in layers.items()}
    hidden = F.linear(x, down).detach()
    ways |= {
        "first product": forward(lambda: F.linear(x, down)),
        "second product": forward(lambda: F.linear(hidden, up, bias)),
    }
    passes = [("forward", ways, once, flops)]
    if gradients:
        ways = {name: both(*layer) for name, layer in layers.items()}
        passes.append(("forward and backward", ways, once + again, 3 * flops))
    result = []
    for what, ways, size, work in passes:
        bound = 1e6 * rates.seconds(Work(flops=work, bytes=size, dtype="bfloat16"))
        row = {"what": what, "rows": rows, "in": features, "rank": rank, "out": out, "bound": bound}
        result.append(row | times(ways, flush))
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the numbers")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first so many")
    parser.add_argument("--everywhere", action="store_true", help="one kernel also where two products are faster")
    parser.add_argument("--pointwise", action="store_true", help="ResNet-50's 1x1 convolutions as well")
    parser.add_argument("--no-bias", action="store_true", help="as in a LLaMA's layers")
    parser.add_argument("--forward", action="store_true", help="no gradients")
    options = parser.parse_args(arguments)
    if options.everywhere:
        os.environ["EFFCORE_LOWRANK_EVERYWHERE"] = "1"
    use_carried_libraries()
    flush = torch.zeros(64 << 20, device="cuda")
    rates, fill = ceilings(flush)
    product = rates.matmul["bfloat16"]
    print(f"copy {rates.copy / 1e12:.2f} TB/s, fill {fill / 1e12:.2f} TB/s, product {product / 1e12:.0f} TFLOP/s")
    table: list[dict[str, Any]] = []
    problems = [
        (rows, features, rank, out)
        for features, out in SHAPES[: options.shapes]
        for rank in options.ranks
        for rows in options.rows
    ]
    if options.pointwise:
        problems = [*POINTWISE, *problems]
    for problem in problems:
        for row in case(*problem, rates, flush, not options.forward, not options.no_bias):
            table.append(row)
            print(
                f"{row['what']:21} M={row['rows']:6} {row['in']:4}->{row['out']:4} r={row['rank']:3}  effcore "
                f"{row['effcore']:7.1f} us  two {row['two']:7.1f} ({row['two'] / row['effcore']:.2f}x)  dense "
                f"{row['dense']:7.1f} ({row['dense'] / row['effcore']:.2f}x)  {row['bound'] / row['effcore']:.0%} of the bound",
                flush=True,
            )
        if options.json:
            report = {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "everywhere": options.everywhere,
                "bias": not options.no_bias,
                "copy_bytes_s": rates.copy,
                "fill_bytes_s": fill,
                "product_flops_s": product,
                "rows": table,
            }
            options.json.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
