"""Where a step of a compiled ResNet goes: microseconds of its convolutions by shape and of its other kernels.

Beside each kind what the roofline of `speed` grants it, so that what a variant loses against its prediction can be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.ceilings import Ceilings
from benchmarks.claims import _low_rank_roofline as roofline
from effcore.nn.low_rank import LowRankConv2d

KINDS = ("k x k", "1 x 1", "stem", "norms, activations")
CONVOLUTIONS = ("aten::cudnn_convolution", "aten::convolution_backward")


def _kind(size: list[int]) -> str:
    """Of a convolution with a weight [out, in, height, width]."""
    return {1: "1 x 1", 3: "k x k"}.get(size[2], "stem")


def kernels(step: Callable[[], Any], count: int = 3) -> list[dict[str, Any]]:
    """What a GPU did in one step: convolutions by the shapes of what they are called with, compiled kernels by name.

    Products are 1×1 convolutions of few pixels, and the last layer, which takes less than a hundredth; the loss is left out.
    """
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as profiler:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    rows = []
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.key in CONVOLUTIONS:
            x, weight = event.input_shapes[:2] if event.key == CONVOLUTIONS[0] else event.input_shapes[1:3]
            us = event.device_time_total / count
            what = "backward" if event.key == CONVOLUTIONS[1] else "forward"
            rows.append(
                {"kind": _kind(weight), "what": what, "x": x, "weight": weight, "calls": event.count / count, "us": us}
            )
        elif event.key.startswith(("effcore::lowrank_linear", "aten::mm", "aten::addmm")) and event.device_time_total:
            us = event.device_time_total / count
            row = {"kind": KINDS[1], "what": event.key, "x": event.input_shapes[0], "weight": event.input_shapes[1]}
            rows.append(row | {"calls": event.count / count, "us": us})
    for event in profiler.key_averages():
        if event.device_type.name == "CUDA" and event.key.startswith(("triton", "stem")):
            us = event.self_device_time_total / count
            # "pad": the images as squares
            kind = KINDS[2 if event.key.startswith("stem") or "pad" in event.key else 3]
            rows.append({"kind": kind, "what": event.key[:120], "calls": event.count / count, "us": us})
    return sorted(rows, key=lambda row: -row["us"])


def granted(model: nn.Module, x: Tensor, training: bool, rates: Ceilings) -> dict[str, float]:
    """The roofline's microseconds by kind."""
    sums = dict.fromkeys(KINDS, 0.0)
    for name, seconds in roofline.layers(model, x, training, rates).items():
        module = model.get_submodule(name)
        if isinstance(module, LowRankConv2d):  # as one: a pair of 1x1s
            sums[KINDS[1]] += seconds * 1e6
        elif isinstance(module, nn.Conv2d):
            sums[_kind(list(module.weight.shape))] += seconds * 1e6
        elif not isinstance(module, nn.Linear):
            sums[KINDS[3]] += seconds * 1e6
    return sums


def spent(model: nn.Module, x: Tensor, training: bool, rates: Ceilings, step: Callable[[], Any]) -> dict[str, Any]:
    """Microseconds of a step by kind, the roofline's, and the longest kernels."""
    found = kernels(step)
    with torch.compiler.set_stance("force_eager"):  # the roofline's hooks are not to be compiled
        predicted = granted(model, x, training, rates)
    by_kind = {kind: sum(r["us"] for r in found if r["kind"] == kind) for kind in KINDS}
    return {"us": by_kind, "roofline_us": predicted, "longest": found[:40]}
