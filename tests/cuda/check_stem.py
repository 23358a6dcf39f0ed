"""The Triton kernels of a ResNet's stem against torch's own functions, on a GPU.

`python tests/cuda/check_stem.py`. Each problem is run twice (the bits must agree) in memory filled with NaN, one compiled too;
errors against float64 may be at most twice those of the same-dtype PyTorch computation. `--sanitize` runs the small ones under
compute-sanitizer's memcheck and racecheck. The table comes last; numbers go to $OUT/stem_check.json, if OUT is set.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]

from effcore.nn.stem import stem  # noqa: E402
from tests.cuda.checks import Result, Sanitizers, finish, poison  # noqa: E402

# (images, channels of one, height, width, channels out)
SMALL = ((2, 3, 2, 8, 8), (2, 3, 26, 40, 16), (3, 1, 30, 24, 24), (2, 4, 64, 64, 64))
COMPILED = (16, 3, 224, 224, 64)
SHAPES = (*SMALL, (5, 3, 224, 160, 64), COMPILED, (3, 2, 100, 216, 40))


def plain(images: Tensor, weight: Tensor, norm: Any) -> Tensor:
    return F.max_pool2d(F.relu(norm(F.conv2d(images, weight, stride=2, padding=3))), 3, 2, 1)


def results(layer: Callable[..., Tensor], images: Tensor, weight: Tensor, norm: Any, dout: Tensor) -> list[Tensor]:
    """The output, the running statistics that it leaves, and gradients."""
    norm = copy.deepcopy(norm)
    leaves = [weight.detach().requires_grad_(), norm.weight, norm.bias]
    out = layer(images, leaves[0], norm)
    gradients = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    return [out.detach(), norm.running_mean, norm.running_var, *gradients]


def problem(shape: tuple[int, ...], dtype: torch.dtype, training: bool) -> tuple[Tensor, Tensor, Any, Tensor]:
    batch, features, height, width, channels = shape
    images = torch.randn(batch, features, height, width, device="cuda").to(dtype, memory_format=torch.channels_last)
    weight = (torch.randn(channels, features, 7, 7, device="cuda") * 0.1).to(dtype)
    norm = nn.BatchNorm2d(channels, device="cuda").train(training)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)  # type: ignore[arg-type]
    out = plain(images, weight, copy.deepcopy(norm).to(dtype))
    return images, weight, norm, torch.randn_like(out)


def _error(ours: Tensor, same: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Against twice that of the same dtype."""
    floor = torch.finfo(dtype).eps * exact.norm()
    return float((ours.double() - exact).norm() / (2 * (same.double() - exact).norm() + floor))


def check(shapes: tuple[tuple[int, ...], ...], compiled: bool) -> list[Result]:
    rows: list[Result] = []
    for dtype in (torch.bfloat16, torch.float16) if compiled else (torch.bfloat16,):
        for shape in shapes:
            for training in (True, False):
                torch.manual_seed(0)
                images, weight, norm, dout = problem(shape, dtype, training)
                poison()
                got, again = (results(stem, images, weight, norm, dout) for _ in range(2))
                good = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
                same = results(plain, images, weight, norm, dout)
                exact = results(plain, images.double(), weight.double(), copy.deepcopy(norm).double(), dout.double())
                others = {"": got}
                if compiled and shape == COMPILED and dtype == torch.bfloat16:
                    torch._dynamo.reset()
                    others[", compiled"] = results(torch.compile(stem, fullgraph=True), images, weight, norm, dout)
                for how, values in others.items():
                    worst = max(_error(a, b, c, dtype) for a, b, c in zip(values, same, exact, strict=True))
                    what = f"{dtype} {shape} {'training' if training else 'evaluation'}{how}"
                    rows.append((what, good and worst <= 1, f"error {worst:.2f} of what is allowed"))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--small", action="store_true", help="the small ones alone, in bfloat16, eagerly")
    options = parser.parse_args()
    rows = check(SMALL if options.small else SHAPES, not options.small)
    if options.small:
        return 0 if all(good for _, good, _ in rows) else 1
    return finish("stem", rows + (Sanitizers(__file__, "stem").results() if options.sanitize else []))


if __name__ == "__main__":
    sys.exit(main())
