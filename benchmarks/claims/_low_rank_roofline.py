"""What a roofline predicts for a convolutional network: each layer's slower one of arithmetic and memory, added up.

A convolution or linear layer reads its input and weights and writes its output; its two gradients do the like, as far as they
are wanted. A batch norm with what is fused into it (activation, residual) reads and writes once at inference; in training it
reads twice and writes once, and reads four times and writes once backward. The norm of a projected shortcut is fused into the
block's last: its input is read with the other's and its output is never written, and backward both read one gradient. In
training the two gradients that meet at a block's input are read, and their sum is written. Pooling moves its input and output.
A stem that is fused is charged as its layers would be one by one: the convolution, the norm, the maximum.
Nothing is charged for launches or for the bits of activations' signs, and nothing gained by caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Work, dtype_name
from benchmarks.ceilings import Ceilings
from effcore.nn.low_rank import LowRankConv2d
from effcore.nn.stem import StemConv2d, StemNorm

BLOCK = "ResNetBottleNeckLayer"
KINDS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def layers(model: nn.Module, x: Tensor, training: bool, ceilings: Ceilings) -> dict[str, float]:
    """Predicted seconds of each layer for a batch like ``x``."""
    seconds: dict[str, float] = {}
    batch = x.shape[0]

    def product(name: str, weights: list[Tensor], size: float, flops: float) -> None:
        passes = 1.0
        if training:
            passes += (name != first) + sum(w.requires_grad for w in weights) / len(weights)
        work = Work(flops=flops, bytes=size, dtype=dtype_name(weights[0].dtype))
        seconds[name] = seconds.get(name, 0.0) + passes * ceilings.seconds(work)

    def hook(name: str) -> Any:
        def after(module: Any, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            item = out.element_size()
            read, written = inputs[0].numel() * batch * item, out.numel() * batch * item
            if isinstance(module, StemConv2d):  # with all behind it: half of the pixels a side are left
                pixels, dense = 4.0 * out.numel() * batch / out.shape[1], 4.0 * written
                flops = 2.0 * pixels * module.weight.numel()
                product(name, [module.weight], read + dense + module.weight.numel() * item, flops)
                moved = 2 * dense * (4 if training else 1) + (dense + written) * (2 if training else 1)
                seconds[name] += moved / ceilings.copy
            elif isinstance(module, LowRankConv2d):  # a pair of 1x1 convolutions, with nothing in memory between them
                pixels, rank = out.numel() * batch // out.shape[1], module.ranks[0]
                flops = 2.0 * pixels * rank * (module.in_channels + module.out_channels)
                product(name, [module.first.weight, module.last.weight], read + written, flops)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                flops = 2.0 * out.numel() * batch * module.weight[0].numel()
                product(name, [module.weight], read + written + module.weight.numel() * item, flops)
            else:
                moved = float(read + written)
                if isinstance(module, nn.BatchNorm2d):
                    moved *= 4 if training else 1
                    moved += written if name in last_norms else 0  # the residual
                    moved -= (4 if training else 2) * written if ".shortcut." in name else 0
                elif type(module).__name__ == BLOCK:
                    moved = 3.0 * read
                elif training:
                    moved *= 2
                seconds[name] = seconds.get(name, 0.0) + moved / ceilings.copy

        return after

    pairs = [(n, m) for n, m in model.named_modules() if isinstance(m, LowRankConv2d) and m.core is None]
    inside = {id(child) for _, pair in pairs for child in pair.children()}
    inside |= {id(m) for m in model.modules() if isinstance(m, StemNorm)}  # charged with the stem
    names = pairs + [(n, m) for n, m in model.named_modules() if isinstance(m, KINDS) and id(m) not in inside]
    first = next(n for n, m in names if isinstance(m, nn.Conv2d))
    blocks = [(n, m) for n, m in model.named_modules() if type(m).__name__ == BLOCK]
    last_norms = {f"{n}.layer.2.normalization" for n, _ in blocks}
    names += blocks if training else []
    handles = [m.register_forward_hook(hook(n)) for n, m in names]
    try:
        with torch.no_grad():
            model.eval()(x[:1])
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return seconds


def seconds(model: nn.Module, x: Tensor, training: bool, ceilings: Ceilings) -> float:
    return sum(layers(model, x, training, ceilings).values())
