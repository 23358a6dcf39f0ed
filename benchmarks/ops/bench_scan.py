"""The scan family: convolution, selective scan and one step; forward alone, and with the gradients.

Bytes count each row of tokens that must be read and each that must be written, once. A scan is bound by its exponentials as
well: the table's bound on the CPU is bytes alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import effcore.ops.scan as ops
from benchmarks.case import CallCost, Candidate, Case, Floor, Inputs, Settings, Work, dtype_name

DTYPES = (torch.float32, torch.bfloat16)
STATES, WIDTH = 16, 4

Shape = tuple[int, int, int]  # batch, tokens, channels


def cases(settings: Settings) -> Iterator[Case]:
    # The floors are the project's: 3 times the best vectorised torch formulation.
    dtypes = (torch.bfloat16,) if settings.cuda else DTYPES
    shapes = [(1, 1024, 1536), (4, 256, 768)]
    if settings.cuda:
        shapes = [(8, 2048, 2048), (1, 16384, 2048), (32, 512, 2048)]
    for shape in shapes[:1] if settings.quick else shapes:
        for dtype in dtypes:
            yield _scan(settings, shape, dtype, grad=False, floor=Floor(3.0))
            yield _scan(settings, shape, dtype, grad=True, floor=Floor(3.0))
            yield _conv(settings, shape, dtype, grad=False)
            yield _conv(settings, shape, dtype, grad=True)


def _name(what: str, shape: Shape, dtype: torch.dtype, grad: bool) -> str:
    return f"{what} {dtype_name(dtype)} B={shape[0]} L={shape[1]} E={shape[2]}{', gradients' if grad else ''}"


def _bytes(shape: Shape, dtype: torch.dtype) -> int:
    return shape[0] * shape[1] * shape[2] * dtype.itemsize


def _with_gradients(names: tuple[str, ...], grad: bool, call):
    """The output, and the gradients of the named inputs where wanted."""

    def run(x: Inputs):
        out = call(x)
        return [out, *torch.autograd.grad(out, [x[n] for n in names], x["dout"])] if grad else [out]

    return run


# ---------------------------------------------------------------- scan


def _scan_inputs(settings: Settings, shape: Shape, dtype: torch.dtype, grad: bool) -> Inputs:
    """As Mamba begins: A = -(1 ... N), step sizes from 0.001 to 0.1."""
    batch, tokens, channels = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=settings.device).to(dtype)

    step = torch.empty(channels, device=settings.device).uniform_(-6.9, -2.3).exp()
    made = {
        "x": normal(*shape),
        "dt": normal(*shape),
        "A": -torch.arange(1.0, STATES + 1, device=settings.device).expand(channels, STATES).contiguous(),
        "B": normal(batch, tokens, STATES),
        "C": normal(batch, tokens, STATES),
        "D": torch.ones(channels, device=settings.device),
        "z": normal(*shape),
        "bias": torch.expm1(step).log(),
    }
    if grad:
        made = {n: t.requires_grad_() for n, t in made.items()} | {"dout": normal(*shape)}
    return made


def _eager(x: Inputs, scan) -> Tensor:
    """Mamba's reference form: gate and step size by elementwise ops, the recurrence by ``scan(decay, input)``."""
    dtype = x["x"].dtype
    wide = {n: t.double() if t.dtype == torch.float64 else t.float() for n, t in x.items()}
    dt = F.softplus(wide["dt"] + wide["bias"])
    decay = torch.exp(dt[..., None] * wide["A"])
    states = scan(decay, dt[..., None] * wide["B"][:, :, None] * wide["x"][..., None])
    y = (states @ wide["C"][..., None])[..., 0] + wide["D"] * wide["x"]
    return (y * F.silu(wide["z"])).to(dtype)


def _loop(decay: Tensor, step: Tensor) -> Tensor:
    states, h = [], torch.zeros_like(step[:, 0])
    for a, b in zip(decay.unbind(1), step.unbind(1), strict=True):
        h = a * h + b
        states.append(h)
    return torch.stack(states, 1)


def _scan_peers(settings: Settings) -> Iterator[tuple[str, object]]:
    yield "loop over tokens", lambda x: _eager(x, _loop)
    if importlib.util.find_spec("mambapy"):
        from mambapy.pscan import pscan

        # Its forward works in place where no gradient is wanted as well.
        yield "mambapy parallel scan", lambda x: _eager(x, pscan)
    if settings.cuda and importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        def theirs(x: Inputs) -> Tensor:
            rows = {n: x[n].mT for n in ("x", "dt", "B", "C", "z")}
            out = selective_scan_fn(
                rows["x"], rows["dt"], x["A"], rows["B"], rows["C"], x["D"], rows["z"], x["bias"], delta_softplus=True
            )
            return out.mT

        yield "mamba-ssm", theirs


def _scan(settings: Settings, shape: Shape, dtype: torch.dtype, *, grad: bool, floor: Floor) -> Case:
    names = ("x", "dt", "A", "B", "C", "D", "z", "bias")

    def ours(x: Inputs) -> Any:
        return ops.selective_scan(x["x"], x["dt"], x["A"], x["B"], x["C"], x["D"], x["z"], x["bias"], True)

    def exact(x: Inputs):
        double = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in x.items()}
        return _with_gradients(names, grad, lambda x: _eager(x, _loop))(double)

    return Case(
        name=_name("scan", shape, dtype, grad),
        inputs=lambda: _scan_inputs(settings, shape, dtype, grad),
        outputs=("out", *(f"d{n}" for n in names)) if grad else ("out",),
        ours=Candidate("effcore", _with_gradients(names, grad, ours)),
        peers=tuple(Candidate(n, _with_gradients(names, grad, f)) for n, f in _scan_peers(settings)),
        exact=exact,
        work=Work(bytes=(11 if grad else 4) * _bytes(shape, dtype)),
        floor=floor,
    )


# ---------------------------------------------------------------- convolution


def _conv(settings: Settings, shape: Shape, dtype: torch.dtype, *, grad: bool) -> Case:
    names, channels = ("x", "weight", "bias"), shape[2]

    def inputs() -> Inputs:
        made = {"x": torch.randn(shape), "weight": torch.randn(channels, WIDTH) / 2, "bias": torch.randn(channels)}
        if grad:
            made["dout"] = torch.randn(shape)
        return {n: t.to(settings.device, dtype).requires_grad_(grad and n != "dout") for n, t in made.items()}

    def composed(x: Inputs) -> Tensor:
        padded = F.pad(x["x"].mT, (WIDTH - 1, 0))
        return F.silu(F.conv1d(padded, x["weight"][:, None], x["bias"], groups=channels)).mT

    def shifted(x: Inputs) -> Tensor:
        """The same as a sum of shifted rows, in the order in which the rows lie."""
        padded = F.pad(x["x"], (0, 0, WIDTH - 1, 0))
        sums = [padded[:, k : k + shape[1]] * x["weight"][:, k] for k in range(WIDTH)]
        return F.silu(sum(sums[1:], sums[0]) + x["bias"])

    def exact(x: Inputs):
        double = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in x.items()}
        return _with_gradients(names, grad, shifted)(double)

    def ours(x: Inputs) -> Tensor:
        return ops.causal_conv1d(x["x"], x["weight"], x["bias"], activation="silu")

    return Case(
        name=_name("conv", shape, dtype, grad),
        inputs=inputs,
        outputs=("out", *(f"d{n}" for n in names)) if grad else ("out",),
        ours=Candidate("effcore", _with_gradients(names, grad, ours)),
        peers=tuple(
            Candidate(n, _with_gradients(names, grad, f)) for n, f in (("conv1d", composed), ("shifts", shifted))
        ),
        exact=exact,
        work=Work(bytes=(5 if grad else 2) * _bytes(shape, dtype)),
    )


def calls(settings: Settings) -> Iterator[CallCost]:
    x, state = torch.randn(1, 8, device=settings.device), torch.zeros(1, 8, 4, device=settings.device)
    A, B = -torch.rand(8, 4, device=settings.device), torch.randn(1, 4, device=settings.device)
    weight = torch.randn(8, 4, device=settings.device)
    yield CallCost("step", lambda: ops.selective_step(state, x, x, A, B, B))
    yield CallCost("scan", lambda: ops.selective_scan(x[:, None], x[:, None], A, B[:, None], B[:, None]))
    yield CallCost("conv", lambda: ops.causal_conv1d(x[:, None], weight))
