"""3D convolutions from 2D and 1D parts, in a model that one already has.

:func:`factorize_conv3d` walks through a model and replaces each ``nn.Conv3d`` by a cheaper module of :mod:`effcore.nn.conv3d`.
A dense d³ kernel has d³ taps, the cross of a d² spatial and a d temporal kernel d² + d − 1.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effcore.methods._surroundings import evaluating
from effcore.nn.conv3d import CatConv3d, CrossConv3d, PatchEmbed3d, R2Plus1DConv3d

COMBINE = ("add", "cat", "r2plus1d")
INIT = ("lstsq", "random")


@dataclass
class LayerReport:
    """What became of one Conv3d.

    Attributes:
        name: in the model.
        became: "add", "cat", "r2plus1d", "product" (stride = kernel), or "kept".
        reason: why it was kept, or an empty string.
        parameters: before and after.
        error: ‖W − W'‖ / ‖W‖ of the new kernel as a dense one (0: exact); NaN with random weights.
        milliseconds: of a forward pass on the sample's input, before and after; None where no sample was given.
    """

    name: str
    became: str
    reason: str = ""
    parameters: tuple[int, int] = (0, 0)
    error: float = 0.0
    milliseconds: tuple[float, float] | None = None


def factorize_conv3d(
    model: nn.Module,
    combine: str = "add",
    *,
    init: str = "lstsq",
    sample: Any = None,
    inplace: bool = True,
) -> nn.Module:
    """Replaces the 3D convolutions of a model.

    - kernels with time and space of their own (odd, in one group, undilated, zero padding): by ``combine``;
    - stride = kernel without padding (patch embeddings): by one matrix product, exactly;
    - everything else is kept, weights that two layers share among it, and :func:`report` says why.

    Args:
        model: any module. Replaced layers keep device, dtype, training mode and whether they train.
        combine: "add": :class:`~effcore.nn.conv3d.CrossConv3d`; "cat": :class:`~effcore.nn.conv3d.CatConv3d`; "r2plus1d":
            :class:`~effcore.nn.conv3d.R2Plus1DConv3d` with nothing in between.
        init: "lstsq": the parts whose dense kernel is nearest to the layer's in the sum of squares. For "add" these are the
            kernel's own taps on the cross, for "r2plus1d" its truncated singular value decomposition. "random": fresh weights.
        sample: an input of the model (a tensor, or a tuple of arguments). With it both forms of each layer are timed on
            what reaches it, and a layer that would get slower is kept.
        inplace: False leaves ``model`` alone and returns a converted copy.

    Returns:
        The model. ``effcore.methods.conv3d.report(model)`` lists what was done.

    Raises:
        ValueError: an argument is not one of the above, the model has no Conv3d, or its weights are not loaded (meta device).
    """
    if combine not in COMBINE:
        raise ValueError(f"effcore.factorize_conv3d: combine must be one of {', '.join(COMBINE)}, got {combine!r}")
    if init not in INIT:
        raise ValueError(f"effcore.factorize_conv3d: init must be one of {', '.join(INIT)}, got {init!r}")
    if not inplace:
        model = copy.deepcopy(model)
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Conv3d}
    if not layers:
        raise ValueError("effcore.factorize_conv3d: the model has no nn.Conv3d")
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise ValueError(f"effcore.factorize_conv3d: the weights of {name} are on the meta device; load them first")
    inputs = {} if sample is None else _inputs(model, layers, sample)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    reports = []
    replacements: dict[nn.Conv3d, nn.Module] = {}  # a layer that the model uses twice stays one
    for name, layer in layers.items():
        others = [o for o in owners.get(id(layer.weight), []) if model.get_submodule(o) is not layer]
        report, replacement = _convert(name, layer, combine, init, inputs.get(name), others)
        reports.append(report)
        if replacement is not None:
            replacements[layer] = replacement
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # a child may stand there twice
            if isinstance(child, nn.Conv3d) and child in replacements:
                setattr(parent, name, replacements[child])
    if isinstance(model, nn.Conv3d):
        model = replacements.get(model, model)
    model.__dict__["_effcore_conv3d"] = reports
    return model


def report(model: nn.Module) -> list[LayerReport]:
    """One entry for each Conv3d that :func:`factorize_conv3d` found in ``model``."""
    if "_effcore_conv3d" not in model.__dict__:
        raise ValueError("effcore.methods.conv3d.report: factorize_conv3d has not converted this model")
    return model.__dict__["_effcore_conv3d"]


def describe(model: nn.Module) -> str:
    """The report as a table."""
    lines = [f"{'layer':<32} {'became':<9} {'parameters':>21} {'error':>7} {'ms':>15}"]
    for r in report(model):
        times = f"{r.milliseconds[0]:7.2f} {r.milliseconds[1]:7.2f}" if r.milliseconds is not None else ""
        count = f"{r.parameters[0]:>10,} {r.parameters[1]:>10,}"
        lines.append(f"{r.name:<32} {r.became:<9} {count} {r.error:7.3f} {times:>15} {r.reason}".rstrip())
    return "\n".join(lines)


def nearest_cross(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """The cross whose dense kernel is nearest to ``kernel`` [O, C, kt, kh, kw] in the sum of squares.

    Off the cross nothing can be done; on it every tap is free, so the fit keeps the kernel's own taps. The middle tap, which
    both kernels have, is shared equally: of all ways to divide it the one of least norm.
    """
    kt, kh, kw = kernel.shape[2:]
    spatial = kernel[:, :, kt // 2].clone()
    temporal = kernel[:, :, :, kh // 2, kw // 2].clone()
    middle = kernel[:, :, kt // 2, kh // 2, kw // 2] / 2
    spatial[:, :, kh // 2, kw // 2] = middle
    temporal[:, :, kt // 2] = middle
    return spatial, temporal


def _convert(
    name: str, layer: nn.Conv3d, combine: str, init: str, x: Tensor | None, others: list[str]
) -> tuple[LayerReport, nn.Module | None]:
    """``others``: other modules that have this layer's weight, which parts of it would untie."""
    before = sum(p.numel() for p in layer.parameters())
    kind, reason = _kind(layer, combine)
    if others and kind in COMBINE:
        kind, reason = "kept", f"shares its weight with {', '.join(others)}"
    if kind == "kept":
        return LayerReport(name, "kept", reason, (before, before)), None
    made, dense = _BUILD[kind](layer, init)
    made.to(layer.weight.device, layer.weight.dtype).train(layer.training)
    for part, parameter in made.named_parameters():
        of_bias = layer.bias is not None and part.endswith("bias")
        parameter.requires_grad_((layer.bias if of_bias else layer.weight).requires_grad)  # type: ignore[union-attr]
    error = float("nan") if dense is None else _distance(layer.weight, dense)
    after = sum(p.numel() for p in made.parameters())
    report = LayerReport(name, kind, "", (before, after), error)
    if x is not None:
        report.milliseconds = _milliseconds(layer, made, x)
        if report.milliseconds[1] > report.milliseconds[0]:
            report.became, report.reason = "kept", f"{kind} would be slower"
            report.parameters, report.error = (before, before), 0.0
            return report, None
    return report, made


def _kind(layer: nn.Conv3d, combine: str) -> tuple[str, str]:
    """What a layer becomes, and if it is kept, why."""
    kernel, stride, padding = tuple(layer.kernel_size), tuple(layer.stride), layer.padding
    if layer.groups != 1:
        return "kept", f"{layer.groups} groups"
    if tuple(layer.dilation) != (1, 1, 1):
        return "kept", f"dilation {tuple(layer.dilation)}"
    no_padding = padding == "valid" or (not isinstance(padding, str) and not any(padding))
    if kernel == stride and no_padding and kernel != (1, 1, 1):
        return "product", ""
    if layer.padding_mode != "zeros":
        return "kept", f"padding_mode {layer.padding_mode}"
    if any(k % 2 == 0 for k in kernel):
        return "kept", f"even kernel {kernel}"
    if kernel[0] == 1 or kernel[1:] == (1, 1):
        return "kept", f"kernel {kernel} has one part"
    if combine == "cat" and layer.out_channels < 2:
        return "kept", "one output channel"
    return combine, ""


def _arguments(layer: nn.Conv3d) -> dict[str, Any]:
    padding = {"same": "same", "valid": 0}[layer.padding] if isinstance(layer.padding, str) else tuple(layer.padding)
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": tuple(layer.kernel_size),
        "stride": tuple(layer.stride),
        "padding": padding,
        "bias": layer.bias is not None,
    }


# Each makes the module and, unless its weights are random, the dense kernel that it stands for.
Built = tuple[nn.Module, Tensor | None]


@torch.no_grad()
def _add(layer: nn.Conv3d, init: str) -> Built:
    made = CrossConv3d(**_arguments(layer))
    if init == "random":
        return made, None
    made.to(layer.weight.device, layer.weight.dtype)
    for to, part in zip((made.spatial, made.temporal), nearest_cross(layer.weight), strict=True):
        to.copy_(part.view_as(to))
    if made.bias is not None and layer.bias is not None:
        made.bias.copy_(layer.bias)
    dense = torch.zeros_like(layer.weight)
    t, h, w = (k // 2 for k in layer.kernel_size)
    dense[:, :, t] += made.spatial[:, :, 0]
    dense[:, :, :, h, w] += made.temporal[..., 0, 0]
    return made, dense


@torch.no_grad()
def _cat(layer: nn.Conv3d, init: str) -> Built:
    made = CatConv3d(**_arguments(layer))
    if init == "random":
        return made, None
    first = made.spatial.out_channels
    dense = torch.zeros_like(layer.weight)
    t, h, w = (k // 2 for k in layer.kernel_size)
    dense[:first, :, t] = layer.weight[:first, :, t]
    dense[first:, :, :, h, w] = layer.weight[first:, :, :, h, w]
    made.to(layer.weight.device, layer.weight.dtype)
    made.spatial.weight.copy_(layer.weight[:first, :, t : t + 1])
    made.temporal.weight.copy_(layer.weight[first:, :, :, h : h + 1, w : w + 1])
    if layer.bias is not None and made.spatial.bias is not None and made.temporal.bias is not None:
        made.spatial.bias.copy_(layer.bias[:first])
        made.temporal.bias.copy_(layer.bias[first:])
    return made, dense


@torch.no_grad()
def _r2plus1d(layer: nn.Conv3d, init: str) -> Built:
    """W[(o, l), (c, i, j)] = Σ_m M[o, m, l] S[m, c, i, j] of rank `mid`: the truncated SVD is the nearest one."""
    made = R2Plus1DConv3d(**_arguments(layer))
    if init == "random":
        return made, None
    (outputs, channels), (kt, kh, kw) = layer.weight.shape[:2], layer.kernel_size
    matrix = layer.weight.double().permute(0, 2, 1, 3, 4).reshape(outputs * kt, channels * kh * kw)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    mid = made.spatial.out_channels
    rank = min(mid, len(s))
    root = s[:rank].sqrt()
    left, right = u[:, :rank] * root, root[:, None] * v[:rank]
    made.to(layer.weight.device, layer.weight.dtype)
    made.spatial.weight.zero_()
    made.temporal.weight.zero_()
    made.spatial.weight[:rank] = right.reshape(rank, channels, 1, kh, kw).to(layer.weight)
    made.temporal.weight[:, :rank] = left.reshape(outputs, kt, rank).mT[..., None, None].to(layer.weight)
    if made.temporal.bias is not None and layer.bias is not None:
        made.temporal.bias.copy_(layer.bias)
    dense = (left @ right).reshape(outputs, kt, channels, kh, kw).permute(0, 2, 1, 3, 4)
    return made, dense


@torch.no_grad()
def _product(layer: nn.Conv3d, init: str) -> Built:
    made = PatchEmbed3d(layer.in_channels, layer.out_channels, tuple(layer.kernel_size), layer.bias is not None)
    # Exact, whatever `init`: the very same parameters.
    made.register_parameter("weight", layer.weight)  # type: ignore[arg-type]
    made.register_parameter("bias", layer.bias)  # type: ignore[arg-type]
    return made, layer.weight


_BUILD: dict[str, Callable[[nn.Conv3d, str], Built]] = {
    "add": _add,
    "cat": _cat,
    "r2plus1d": _r2plus1d,
    "product": _product,
}


def _distance(weight: Tensor, dense: Tensor) -> float:
    exact = weight.detach().double()
    return ((dense.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def _inputs(model: nn.Module, layers: dict[str, nn.Conv3d], sample: Any) -> dict[str, Tensor]:
    """What reaches each layer first."""
    found: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.setdefault(name, args[0].detach())

        return hook

    hooks = [layer.register_forward_pre_hook(remember(name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            model(*sample) if isinstance(sample, tuple) else model(sample)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def _milliseconds(before: nn.Module, after: nn.Module, x: Tensor, rounds: int = 5) -> tuple[float, float]:
    """Medians, alternating, each on the memory format that suits it: the new layer on channels_last_3d."""
    last = x.contiguous(memory_format=torch.channels_last_3d)

    def once(layer: nn.Module, voxels: Tensor) -> float:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        start = time.perf_counter()
        layer(voxels)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return (time.perf_counter() - start) * 1e3

    for layer, voxels in ((before, x), (after, last)):
        once(layer, voxels)
    times = [(once(before, x), once(after, last)) for _ in range(rounds)]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)
