"""ResNets at 2×: vanilla, timed ranks, freezing, merging, branching; images a second against the same model dense.

Beside each: what the paper gained, and what a roofline of every layer predicts on this chip (_low_rank_roofline).
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ceilings
from benchmarks.claims import _low_rank_roofline as roofline
from benchmarks.ops import lowrank_cuda
from effcore.methods import low_rank
from effcore.methods.low_rank_callbacks import freeze
from effcore.methods.low_rank_merge import branch, merge

DEPTHS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
# Per cent of images a second gained in training and at inference, as the papers have them.
PAPER = {
    (50, "merging"): (43.6, 40.6),
    (152, "vanilla"): (11.7, 13.1),
    (152, "timed ranks"): (15.9, 18.4),
    (152, "freezing"): (31.7, 13.1),
    (152, "merging"): (55.9, 54.9),
}


def resnet(depth: int) -> nn.Module:
    import transformers

    config = transformers.ResNetConfig(depths=DEPTHS[depth], layer_type="bottleneck", num_labels=1000)
    return transformers.ResNetForImageClassification(config)


def variants(dense: nn.Module, x: Tensor, training: bool) -> dict[str, Callable[[], nn.Module]]:
    def made(change: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            model = copy.deepcopy(dense)
            change(model)
            return model

        return make

    cores = [r"layer\.1\.convolution"]
    multiple = 32 if x.is_cuda else 16

    def frozen(model: nn.Module) -> None:
        low_rank.decompose(model, 2.0, multiple=multiple)
        freeze(model)

    def branched(model: nn.Module) -> None:
        low_rank.decompose(model, 2.0, multiple=multiple)
        branch(model, 4)

    timed = {"data": [x], "measure": "training" if training else "inference", "weighted": False}
    return {
        "vanilla": made(lambda m: low_rank.decompose(m, 2.0, multiple=1)),  # the paper's ranks: 38, 77, 154, 309
        "multiples": made(lambda m: low_rank.decompose(m, 2.0, multiple=multiple)),
        "timed ranks": made(lambda m: low_rank.decompose(m, 2.0, **timed)),  # type: ignore[arg-type]
        "freezing": made(frozen),
        "merging": made(lambda m: merge(m, 2.0, multiple=multiple)),
        "branching": made(branched),
        "cores only, timed": made(lambda m: low_rank.decompose(m, 2.0, include=cores, **timed)),  # type: ignore[arg-type]
    }


def _compiled(model: nn.Module) -> Callable[[Tensor], Any]:
    """Compiled under a code object of its own: models of one class share a limit of compilations, and run eager beyond it."""
    space: dict[str, Any] = {"model": model}
    exec("def call(x):\n    return model(x)", space)
    return torch.compile(space["call"])


def _rates(device: str, dtype: torch.dtype) -> ceilings.Ceilings:
    if device == "cuda":
        return lowrank_cuda.ceilings(torch.zeros(64 << 20, device=device))[0]
    return ceilings.measure(device, [dtype])


def _seconds(model: nn.Module, call: Callable[[Tensor], Any], x: Tensor, training: bool) -> float:
    model.zero_grad(set_to_none=True)
    begin = time.perf_counter()
    if training:
        call(x).logits.float().logsumexp(1).sum().backward()
    else:
        with torch.no_grad():
            call(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(
    depth: int, device: str, batch: int, *, training: bool, compiled: bool, rounds: int, only: str = "", size: int = 224
) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    dense = resnet(depth).to(device=device, dtype=dtype, memory_format=torch.channels_last).train(training)
    x = torch.randn(batch, 3, size, size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    rates = _rates(device, dtype)
    baseline = _compiled(dense) if compiled else dense
    predicted_dense = roofline.seconds(dense, x, training, rates)
    for name, make in variants(dense, x, training).items():
        if only and name not in only.split(","):
            continue
        begin = time.perf_counter()
        model = make()
        took = time.perf_counter() - begin
        runs = {"dense": (dense, baseline), name: (model, _compiled(model) if compiled else model)}
        times: dict[str, list[float]] = {n: [] for n in runs}
        for _ in range(2):
            for run in runs.values():
                _seconds(*run, x, training)
        for _ in range(rounds):
            for n, run in runs.items():
                times[n].append(_seconds(*run, x, training))
        ratio = statistics.median(a / b for a, b in zip(times["dense"], times[name], strict=True))
        paper = PAPER.get((depth, name))
        predicted = predicted_dense / roofline.seconds(model, x, training, rates)
        r: dict[str, Any] = {
            "model": f"ResNet-{depth}",
            "variant": name,
            "what": "training" if training else "inference",
            "parameters": sum(p.numel() for p in model.parameters()),
            "parameters_dense": sum(p.numel() for p in dense.parameters()),
            "gflops": _gflops(model, x),
            "gflops_dense": _gflops(dense, x),
            "images_s_dense": batch / statistics.median(times["dense"]),
            "images_s": batch / statistics.median(times[name]),
            "ratio": ratio,
            "ratio_roofline": predicted,
            "seconds_dense_roofline": predicted_dense,
            "paper_gain_percent": None if paper is None else paper[0 if training else 1],
            "seconds_to_make": took,
        }
        print(
            f"ResNet-{depth} {r['what']:9} {name:18} {r['parameters'] / 1e6:6.1f} of {r['parameters_dense'] / 1e6:.1f} M  "
            f"{r['gflops']:.2f} of {r['gflops_dense']:.2f} GFLOP  {r['images_s']:7.1f} of {r['images_s_dense']:.1f} images/s  "
            f"{ratio:.2f}x  (roofline {predicted:.2f}x)"
            + ("" if paper is None else f"  (paper {1 + r['paper_gain_percent'] / 100:.2f}x)"),
            flush=True,
        )
        yield r


def _gflops(model: nn.Module, x: Tensor) -> float:
    """Of one image, forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x[:1])
    return counter.get_total_flops() / 1e9
