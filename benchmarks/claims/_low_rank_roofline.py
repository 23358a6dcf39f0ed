"""What a roofline predicts for a convolutional network: each layer's slower one of arithmetic and memory, added up.

A convolution or linear layer reads its input and weights and writes its output; its two gradients do the like, as far as they
are wanted. A batch norm with what is fused into it (activation, residual) reads and writes once at inference; in training it
reads twice and writes once, and reads four times and writes once backward. Pooling moves its input and output. Nothing is
charged for launches, and nothing gained by caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Work, dtype_name
from benchmarks.ceilings import Ceilings

KINDS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def layers(model: nn.Module, x: Tensor, training: bool, ceilings: Ceilings) -> dict[str, float]:
    """Predicted seconds of each layer for a batch like ``x``."""
    seconds: dict[str, float] = {}
    batch = x.shape[0]

    def product(name: str, module: Any, size: float, flops: float) -> None:
        wanted = 1
        if training:
            wanted += (name != first) + module.weight.requires_grad
        work = Work(flops=flops, bytes=size, dtype=dtype_name(module.weight.dtype))
        seconds[name] = seconds.get(name, 0.0) + wanted * ceilings.seconds(work)

    def hook(name: str) -> Any:
        def after(module: Any, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            item = out.element_size()
            read, written = inputs[0].numel() * batch * item, out.numel() * batch * item
            if isinstance(module, nn.Conv2d | nn.Linear):
                per_output = module.weight[0].numel()
                flops = 2.0 * out.numel() * batch * per_output
                product(name, module, read + written + module.weight.numel() * item, flops)
            else:
                passes = 1 if not training else 4 if isinstance(module, nn.BatchNorm2d) else 2
                residual = (2 if training else 1) * written if name in last_norms else 0
                seconds[name] = seconds.get(name, 0.0) + (passes * (read + written) + residual) / ceilings.copy

        return after

    names = [(n, m) for n, m in model.named_modules() if isinstance(m, KINDS)]
    first = next(n for n, m in names if isinstance(m, nn.Conv2d))
    blocks = [n for n, m in model.named_modules() if type(m).__name__ == "ResNetBottleNeckLayer"]
    last_norms = {f"{n}.layer.2.normalization" for n in blocks}
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
