"""What `effcore.nn.faster` changes, one by one: a ResNet's stem, narrow convolutions; forward and backward.

Each as torch.compile makes it of torch's module and of ours, in microseconds of kernels, beside the bound by memory: of the
stem, images and the convolution's output, each read or written as often as it must.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims._kernels import of_a_step
from benchmarks.ops.lowrank_cuda import ceilings
from effcore.nn.faster import faster


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


def parts(batch: int) -> Iterator[dict[str, Any]]:
    rates, _ = ceilings(torch.zeros(64 << 20, device="cuda"))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").bfloat16().to(memory_format=torch.channels_last)

    images, y = batch * 224 * 224 * 3, batch * 112 * 112 * 64
    # Forward: images, y written, y twice, windows. Backward: windows' gradients twice, y, its gradient both ways, images.
    cases: list[tuple[str, nn.Module, list[Tensor], bool, float]] = [
        ("stem", Stem(), [random(batch, 3, 224, 224)], False, 2 * images + 6 * y + 0.75 * y)
    ]
    narrow = nn.Conv2d(32, 32, 3, padding=1, bias=False)
    x = random(batch, 32, 56, 56)
    cases.append(("3×3, 32 channels of 56×56", nn.Sequential(narrow), [x], True, 6.0 * x.numel()))
    for name, module, inputs, wanted, numbers in cases:
        module = module.to(device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
        row: dict[str, Any] = {"part": name, "bound_us": 2e6 * numbers / rates.copy}
        for who, model in (("torch", module), ("effcore", faster(copy.deepcopy(module)))):
            torch._dynamo.reset()
            kernels = of_a_step(_steps(model, [x.requires_grad_(wanted) for x in inputs]), 5)
            row[who] = {"us": sum(us for *_, us in kernels), "kernels": kernels}
        print(
            f"{name}: {row['torch']['us']:.0f} us by torch, {row['effcore']['us']:.0f} us, bound {row['bound_us']:.0f} us",
            flush=True,
        )
        yield row


def _steps(model: nn.Module, inputs: list[Tensor]) -> Callable[[int], None]:
    compiled = torch.compile(model, dynamic=False)
    leaves = [*(x for x in inputs if x.requires_grad), *model.parameters()]

    def run(count: int) -> None:
        for _ in range(count):
            out = compiled(*inputs)
            out = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(out, leaves, [out[0].detach()] * len(out))
        torch.cuda.synchronize()

    run(2)
    return run
