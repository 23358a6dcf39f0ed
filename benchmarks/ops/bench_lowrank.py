"""The lowrank family: a linear layer of two factors against two products of torch's.

Bytes are both factors, the input and the output, once; operations 2·rows·rank·(in + out), and twice as many again with the
gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import effcore.ops.lowrank as ops
from benchmarks.case import CallCost, Candidate, Case, Floor, Inputs, Settings, Work, dtype_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Shape = tuple[int, int, int]  # in, rank, out


def cases(settings: Settings) -> Iterator[Case]:
    dtypes = (torch.bfloat16,) if settings.cuda else DTYPES
    rows = (4096, 16384, 65536) if settings.cuda else (1, 4, 16, 64, 256)
    shapes: list[Shape] = [(768, 128, 3072), (2048, 512, 2048), (576, 96, 1536)]
    if settings.cuda:
        shapes = [(768, r, 3072) for r in (64, 128, 256, 512)] + [(3072, 256, 768), (4096, 512, 4096)]
    for shape in shapes[:1] if settings.quick else shapes:
        for dtype in dtypes:
            for n in rows:
                yield _forward(settings, n, shape, dtype)
            yield _both(settings, rows[-1], shape, dtype)


def _name(what: str, rows: int, shape: Shape, dtype: torch.dtype) -> str:
    return f"{what} {dtype_name(dtype)} M={rows} {shape[0]}->{shape[2]} r={shape[1]}"


def _inputs(settings: Settings, rows: int, shape: Shape, dtype: torch.dtype, grad: bool = False) -> Inputs:
    features, rank, out = shape

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, device=settings.device) * scale).to(dtype).requires_grad_(grad)

    return {
        "x": random(rows, features),
        "down": random(rank, features, scale=features**-0.5),
        "up": random(out, rank, scale=rank**-0.5),
        "bias": random(out),
    }


def _two(x: Inputs) -> Tensor:
    return F.linear(F.linear(x["x"], x["down"]), x["up"], x["bias"])


def _floor(settings: Settings, rows: int, shape: Shape) -> Floor:
    """The project's: 1.4 for small ranks on a GPU, 1.2 for few rows on the CPU, elsewhere no slower."""
    if settings.cuda:
        return Floor(1.4 if shape[1] <= 256 and rows >= 16384 else 0.97)
    return Floor(1.2 if rows <= 16 else 0.97)


def _forward(settings: Settings, rows: int, shape: Shape, dtype: torch.dtype) -> Case:
    features, rank, out = shape
    moved = rank * (features + out) + rows * (features + out) + out
    return Case(
        name=_name("forward", rows, shape, dtype),
        inputs=lambda: _inputs(settings, rows, shape, dtype),
        outputs=("out",),
        ours=Candidate("effcore", lambda x: [ops.lowrank_linear(x["x"], x["down"], x["up"], x["bias"])], torch.no_grad),
        peers=(Candidate("two linears", lambda x: [_two(x)], torch.no_grad),),
        exact=lambda x: [_two({name: t.double() for name, t in x.items()})],
        work=Work(flops=2.0 * rows * rank * (features + out), bytes=moved * dtype.itemsize, dtype=dtype_name(dtype)),
        floor=_floor(settings, rows, shape),
    )


def _both(settings: Settings, rows: int, shape: Shape, dtype: torch.dtype) -> Case:
    features, rank, out = shape

    def inputs() -> Inputs:
        dout = torch.randn(rows, out, device=settings.device).to(dtype)
        return _inputs(settings, rows, shape, dtype, grad=True) | {"dout": dout}

    def gradients(value: Tensor, x: Inputs) -> list[Tensor]:
        return [value, *torch.autograd.grad(value, [x["x"], x["down"], x["up"], x["bias"]], x["dout"])]

    def exact(x: Inputs) -> list[Tensor]:
        wide = {name: t.detach().double().requires_grad_(name != "dout") for name, t in x.items()}
        return gradients(_two(wide), wide)

    return Case(
        name=_name("forward and backward", rows, shape, dtype),
        inputs=inputs,
        outputs=("out", "dx", "ddown", "dup", "dbias"),
        ours=Candidate("effcore", lambda x: gradients(ops.lowrank_linear(x["x"], x["down"], x["up"], x["bias"]), x)),
        peers=(Candidate("two linears", lambda x: gradients(_two(x), x)),),
        exact=exact,
        work=Work(flops=6.0 * rows * rank * (features + out), dtype=dtype_name(dtype)),
        floor=Floor(0.97),
    )


def calls(settings: Settings) -> Iterator[CallCost]:
    x = _inputs(settings, 1, (8, 4, 8), torch.float32)
    yield CallCost(
        "lowrank_linear",
        lambda: ops.lowrank_linear(x["x"], x["down"], x["up"], x["bias"]),
        peers={"two linears": lambda: _two(x)},
    )
