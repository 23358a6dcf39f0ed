"""The conv3d family: the cross-shaped convolution against Conv3d with the dense kernel, and against the sum of a spatial and a
temporal Conv3d; forward alone, and with the gradients.

The first peer computes the same function with the dense kernel, which is what users of Conv3d pay (a dense kernel that is not
zero off the cross costs the same). Memory formats are both tried: "first" is PyTorch's default, "last" is channels_last_3d.
FLOPs are those of the cross, 11 taps of 27.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Candidate, Case, Floor, Inputs, Settings, Work, dtype_name
from effcore.ops.conv3d import cross_conv3d
from effcore.reference import conv3d as ref

DTYPES = (torch.float32, torch.bfloat16)

Shape = tuple[int, int, int, int]  # batch, channels, frames, height = width

# The 3D part of a ResNet-18 on 16 frames; the last one leaves oneDNN's fast path in float32.
SHAPES = [(8, 64, 16, 56), (8, 128, 8, 28), (8, 256, 4, 14)]
SMALL = (1, 64, 8, 28)


def cases(settings: Settings) -> Iterator[Case]:
    # The floors are the project's.
    dense, composed = ("conv3d", "two convolutions")
    if settings.cuda:
        for shape in SHAPES[1:2] if settings.quick else SHAPES:
            yield _forward(settings, shape, torch.bfloat16, Floor(2.0, dense))
            yield _with_gradients(settings, shape, torch.bfloat16, Floor(1.8, dense))
        yield _forward(settings, SHAPES[0], torch.bfloat16, Floor(1.3, composed), " against the composition")
        return
    for shape in [SMALL] if settings.quick else [SMALL, *SHAPES]:
        yield _forward(settings, shape, torch.float32, Floor(4.0 if shape == SMALL else 1.6, dense))
        yield _with_gradients(settings, shape, torch.float32, Floor(4.0 if shape == SMALL else 1.5, dense))
        yield _forward(settings, shape, torch.bfloat16)
        yield _with_gradients(settings, shape, torch.bfloat16)


def _inputs(settings: Settings, shape: Shape, dtype: torch.dtype, *, grad: bool = False) -> Inputs:
    """Each tensor in both memory formats, so that no candidate pays for a conversion."""
    batch, channels, frames, side = shape
    scale = (12 * channels) ** -0.5

    def both(name: str, t: Tensor, grad: bool) -> Inputs:
        t = t.to(dtype)
        last = t.contiguous(memory_format=torch.channels_last_3d)
        return {f"{name} first": t.requires_grad_(grad), f"{name} last": last.clone().requires_grad_(grad)}

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=settings.device)

    spatial, temporal = randn(channels, channels, 3, 3) * scale, randn(channels, channels, 3) * scale
    spatial, temporal = spatial.to(dtype), temporal.to(dtype)
    made = both("x", randn(batch, channels, frames, side, side), grad)
    made |= both("kernel", ref.dense_kernel(spatial, temporal), grad)
    made |= both("across", spatial[:, :, None], grad) | both("along", temporal[..., None, None], grad)
    if grad:
        made |= both("dout", randn(batch, channels, frames, side, side), False)
    return made | {"spatial": spatial.requires_grad_(grad), "temporal": temporal.requires_grad_(grad)}


def _ours(x: Inputs) -> Tensor:
    return cross_conv3d(x["x last"], x["spatial"], x["temporal"])


def _dense(order: str):
    return lambda x: F.conv3d(x[f"x {order}"], x[f"kernel {order}"], padding=1)


def _composed(order: str):
    def call(x: Inputs) -> Tensor:
        voxels = x[f"x {order}"]
        across = F.conv3d(voxels, x[f"across {order}"], padding=(0, 1, 1))
        return across + F.conv3d(voxels, x[f"along {order}"], padding=(1, 0, 0))

    return call


def _exact_inputs(x: Inputs) -> list[Tensor]:
    return [
        x[name].detach().double().requires_grad_(x[name].requires_grad) for name in ("x first", "spatial", "temporal")
    ]


def _name(what: str, shape: Shape, dtype: torch.dtype) -> str:
    return f"{what} {dtype_name(dtype)} B={shape[0]} C={shape[1]} T={shape[2]} {shape[3]}²"


def _work(shape: Shape, dtype: torch.dtype, passes: int) -> Work:
    batch, channels, frames, side = shape
    positions = batch * frames * side * side
    moved = (2 if passes == 1 else 7) * positions * channels * dtype.itemsize
    return Work(flops=passes * 2.0 * 11 * channels**2 * positions, bytes=moved, dtype=dtype_name(dtype))


def _forward(settings: Settings, shape: Shape, dtype: torch.dtype, floor: Floor | None = None, note: str = "") -> Case:
    def without_gradients(call):
        def run(x: Inputs):
            with torch.no_grad():
                return [call(x)]

        return run

    return Case(
        name=_name("forward", shape, dtype) + note,
        inputs=lambda: _inputs(settings, shape, dtype),
        outputs=("out",),
        ours=Candidate("effcore", without_gradients(_ours)),
        peers=tuple(
            Candidate(f"{what}, channels {order}", without_gradients(call(order)))
            for what, call in (("conv3d", _dense), ("two convolutions", _composed))
            for order in ("last", "first")
        ),
        exact=without_gradients(lambda x: ref.two_branches(*_exact_inputs(x))),
        work=_work(shape, dtype, 1),
        floor=floor,
    )


def _with_gradients(settings: Settings, shape: Shape, dtype: torch.dtype, floor: Floor | None = None) -> Case:
    def gradients(call, order: str, names: tuple[str, ...]):
        def run(x: Inputs):
            leaves = [x[name] for name in names]
            out = call(x)
            dx, *weights = torch.autograd.grad(out, leaves, x[f"dout {order}"])
            # The outputs that all candidates have; the gate compares them.
            return [
                out.detach(),
                dx,
                weights[0][:, :, 1] if weights[0].dim() == 5 and len(weights) == 1 else weights[0],
            ]

        return run

    def exact(x: Inputs):
        leaves = _exact_inputs(x)
        out = ref.two_branches(*leaves)
        dx, dspatial, _ = torch.autograd.grad(out, leaves, x["dout first"].double())
        return [out.detach(), dx, dspatial]

    def squeezed(run):  # [O, C, 1, 3, 3]
        def call(x: Inputs):
            out, dx, dspatial = run(x)
            return [out, dx, dspatial[:, :, 0]]

        return call

    dense = [
        Candidate(f"conv3d, channels {o}", gradients(_dense(o), o, (f"x {o}", f"kernel {o}")))
        for o in ("last", "first")
    ]
    composed = [
        Candidate(
            f"two convolutions, channels {o}",
            squeezed(gradients(_composed(o), o, (f"x {o}", f"across {o}", f"along {o}"))),
        )
        for o in ("last", "first")
    ]
    return Case(
        name=_name("forward, backward", shape, dtype),
        inputs=lambda: _inputs(settings, shape, dtype, grad=True),
        outputs=("out", "dx", "dspatial"),
        ours=Candidate("effcore", gradients(_ours, "last", ("x last", "spatial", "temporal"))),
        peers=(*dense, *composed),
        exact=exact,
        work=_work(shape, dtype, 3),
        floor=floor,
    )
