r"""Merging and branching: fewer layers, and fewer weights in the core.

Merging (2407.20266). In a bottleneck 1×1, k×k, 1×1, Tucker-2 on the k×k makes five layers of three; the outer factors are then
multiplied into the neighbours, and three are left, with r1 and r2 channels between them:

    conv1' = first · BN1(conv1),   core' = core,   conv3' = BN3(conv3) · last

Batch norm is folded first. Without an activation between the layers this is exact at full rank; with one it is not, since
it now acts on r1 channels in another basis: expect to fine-tune.

Branching. A core in N groups keeps its diagonal blocks and drops the others: it is not an identity (on random weights the error
is 0.49, 0.74, 0.84 at N = 2, 4, 8). Channels are re-ordered first so that the blocks hold as much as they can.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effcore.methods.low_rank_factor import KernelFactors, relative_error, reorder, tucker_ranks
from effcore.methods.low_rank_layers import Layer, as_laid_out, replace
from effcore.methods.low_rank_measure import Clock, observe, shape_key
from effcore.methods.low_rank_ranks import default_multiple, fastest_near, pays, snap
from effcore.nn.low_rank import LowRankConv2d

Pair = tuple[int, int]
Conv = nn.Conv2d
Norm = nn.BatchNorm2d


@dataclass
class Bottleneck:
    """Names of the three convolutions of a bottleneck and of the batch norms behind them (or None)."""

    convs: tuple[str, str, str]
    norms: tuple[str | None, str | None, str | None]


def bottlenecks(model: nn.Module) -> list[Bottleneck]:
    """1×1, k×k, 1×1 with batch norms: Hugging Face's ResNetBottleNeckLayer, and conv1, bn1, ... of torchvision and timm."""
    found = []
    for name, module in model.named_modules():
        at = f"{name}." if name else ""
        if isinstance(getattr(module, "conv3", None), Conv) and isinstance(getattr(module, "bn3", None), Norm):
            convs, norms = [f"{at}conv{i}" for i in (1, 2, 3)], [f"{at}bn{i}" for i in (1, 2, 3)]
        elif type(module).__name__ == "ResNetBottleNeckLayer":
            convs, norms = ([f"{at}layer.{i}.{part}" for i in range(3)] for part in ("convolution", "normalization"))
        else:
            continue
        kinds = [model.get_submodule(n) for n in convs]
        if [tuple(c.kernel_size) == (1, 1) for c in kinds] == [True, False, True] and kinds[1].groups == 1:  # type: ignore[arg-type]
            found.append(Bottleneck((convs[0], convs[1], convs[2]), (norms[0], norms[1], norms[2])))
    return found


def folded(conv: Conv, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of a convolution and the batch norm behind it (in evaluation mode)."""
    weight = conv.weight.detach().double()
    bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.detach().double()
    if norm is None:
        return weight, bias
    assert norm.running_mean is not None and norm.running_var is not None
    gamma = weight.new_ones(weight.shape[0]) if norm.weight is None else norm.weight.detach().double()
    beta = torch.zeros_like(gamma) if norm.bias is None else norm.bias.detach().double()
    scale = gamma / (norm.running_var.double() + norm.eps).sqrt()
    return weight * scale[:, None, None, None], (bias - norm.running_mean.double()) * scale + beta


def _conv(like: Conv, weight: Tensor, bias: Tensor | None) -> Conv:
    new = Conv(
        weight.shape[1],
        weight.shape[0],
        like.kernel_size,  # type: ignore[arg-type]
        like.stride,  # type: ignore[arg-type]
        like.padding,  # type: ignore[arg-type]
        like.dilation,  # type: ignore[arg-type]
        bias=bias is not None,
        padding_mode=like.padding_mode,  # type: ignore[arg-type]
        device=like.weight.device,
        dtype=like.weight.dtype,
    )
    with torch.no_grad():
        new.weight.copy_(weight)
        if new.bias is not None and bias is not None:
            new.bias.copy_(bias)
    new.requires_grad_(like.weight.requires_grad)
    return as_laid_out(like.weight, new).train(like.training)


def _norm(channels: int, like: Norm, bias: Tensor) -> Norm:
    """A batch norm that adds ``bias`` alone until it is trained: the one before it is in the weights."""
    assert like.running_mean is not None
    where = like.running_mean
    new = Norm(channels, like.eps, like.momentum, like.affine, device=where.device, dtype=where.dtype)
    assert new.running_var is not None
    new.running_var.fill_(1 - like.eps)
    if like.affine:
        with torch.no_grad():
            new.bias.copy_(bias)
        new.requires_grad_(like.weight.requires_grad)
    return new.train(like.training)


def merge(
    model: nn.Module,
    ratio: float = 2.0,
    *,
    multiple: int | None = None,
    include: Iterable[Bottleneck] | None = None,
    ranks: Mapping[str, Pair] | None = None,
) -> dict[str, float]:
    """Merges every bottleneck of a model, in place. Returns the relative error of each k×k kernel.

    Args:
        ratio: of the k×k kernels (the ranks of Tucker-2); the 1×1s around them shrink with the ranks. 1 keeps full ranks.
        multiple: ranks are multiples of it; by default of 64 on a GPU, where convolutions' times have such steps, else of 16.
        ranks: instead, (r1, r2) by the name of the k×k convolution, as :func:`timed_ranks` finds them; other bottlenecks stay.

    Raises:
        ValueError: the model has no bottleneck, ratio is below 1, or ranks names what is no k×k convolution of a bottleneck, or
            ranks that it cannot have.
    """
    if not ratio >= 1:
        raise ValueError(f"effcore.merge: ratio must be at least 1, got {ratio}")
    blocks = _blocks(model, include)
    if ranks is None:
        ranks = {b.convs[1]: _wanted(model, b, ratio, multiple or _multiple(model, b)) for b in blocks}
    for name, pair in ranks.items():
        if name not in {b.convs[1] for b in blocks}:
            raise ValueError(f"effcore.merge: ranks names {name!r}, which is not the k×k convolution of a bottleneck")
        Layer(name, model.get_submodule(name), "conv").check(pair)
    errors = {}
    for block in blocks:
        if block.convs[1] not in ranks:
            continue
        convs = [model.get_submodule(n) for n in block.convs]
        norms = [None if n is None else model.get_submodule(n) for n in block.norms]
        (w1, b1), (w2, b2), (w3, b3) = (folded(c, n) for c, n in zip(convs, norms, strict=True))  # type: ignore[arg-type]
        first, core, last = KernelFactors.of(w2).split(ranks[block.convs[1]])
        errors[block.convs[1]] = relative_error(w2, torch.einsum("op,pqhw,qi->oihw", last, core, first))
        # The bias of the middle layer passes through its own last factor's inverse: last is orthonormal.
        pieces = (
            (torch.einsum("qi,icxy->qcxy", first, w1), first @ b1),
            (core, last.T @ b2),
            (torch.einsum("ocxy,cp->opxy", w3, last), b3 + w3[:, :, 0, 0] @ (b2 - last @ (last.T @ b2))),
        )
        for name, place, conv, norm, (weight, bias) in zip(block.convs, block.norms, convs, norms, pieces, strict=True):
            assert isinstance(conv, Conv)
            # A convolution's own bias in front of a norm would have a gradient to sum that is zero.
            own = None if isinstance(norm, Norm) and norm.affine else bias
            replace(model, name, _conv(conv, weight, own))
            if place is not None:
                assert isinstance(norm, Norm)
                replace(model, place, _norm(weight.shape[0], norm, bias))
    return errors


def _blocks(model: nn.Module, include: Iterable[Bottleneck] | None) -> list[Bottleneck]:
    blocks = bottlenecks(model) if include is None else list(include)
    if not blocks:
        raise ValueError("effcore.merge: the model has no bottleneck (1x1, kxk, 1x1 convolutions with batch norms)")
    return blocks


def _multiple(model: nn.Module, block: Bottleneck) -> int:
    name = block.convs[1]
    return default_multiple(Layer(name, model.get_submodule(name), "conv"))


def _wanted(model: nn.Module, block: Bottleneck, ratio: float, multiple: int) -> Pair:
    conv: Any = model.get_submodule(block.convs[1])
    out, features, *kernel = conv.weight.shape
    if ratio == 1:
        return features, out
    pair = snap(tucker_ranks(features, out, math.prod(kernel), ratio), multiple)
    assert isinstance(pair, tuple)
    return pair


@torch.no_grad()
def timed_ranks(
    model: nn.Module,
    ratio: float,
    data: Iterable[Any],
    *,
    multiple: int | None = None,
    measure: Literal["inference", "training"] = "inference",
    include: Iterable[Bottleneck] | None = None,
) -> dict[str, Pair]:
    """Ranks for :func:`merge`, after timing the three convolutions of each bottleneck on the shapes that batches show.

    They go to the fast side of a step in time, at most a quarter below the ratio's; a bottleneck that merging would not make
    faster (by 3 %, as timings scatter) is not in the result. Bottlenecks of one shape are timed once.

    Args:
        ratio, multiple, include: as for :func:`merge`.
        data: a few batches, as :func:`effcore.decompose` takes them.
        measure: what is timed, inference or training.

    Raises:
        ValueError: as :func:`merge`; data without a batch.
    """
    if not ratio > 1:
        raise ValueError(f"effcore.timed_ranks: ratio must be above 1, got {ratio}")
    if measure not in ("inference", "training"):
        raise ValueError(f"effcore.timed_ranks: measure must be 'inference' or 'training', got {measure!r}")
    blocks = _blocks(model, include)
    layers = {
        n: Layer(n, model.get_submodule(n), "conv") for b in blocks for n in b.convs
    }  # 1×1s by their whole kernels
    seen = observe(model, list(layers.values()), data, moments=False)
    clock = Clock(training=measure == "training")

    def dense(block: Bottleneck) -> float:
        return sum(clock((shape_key(layers[n]), None), layers[n].module, seen[n]) for n in block.convs)

    def merged(block: Bottleneck, pair: Pair) -> float:
        total = 0.0
        for name, out, features in zip(block.convs, (*pair, None), (None, *pair), strict=True):
            conv: Any = layers[name].module
            weight = conv.weight.new_empty(out or conv.out_channels, features or conv.in_channels, *conv.kernel_size)
            at = seen[name]
            at = dataclasses.replace(at, shape=(at.shape[0], weight.shape[1], *at.shape[2:]))
            total += clock((shape_key(layers[name]), pair), _conv(conv, weight, None), at)
        return total

    def size(block: Bottleneck, pair: Pair) -> int:
        one, core, three = (layers[n].weight.shape for n in block.convs)
        return int(one[1] * pair[0] + math.prod(core[2:]) * pair[0] * pair[1] + pair[1] * three[0])

    result: dict[str, Pair] = {}
    for block in blocks:
        if any(n not in seen for n in block.convs):
            continue
        step = multiple or _multiple(model, block)
        wanted = _wanted(model, block, ratio, step)
        pair, ms = fastest_near(wanted, step, partial(merged, block), partial(size, block))
        assert isinstance(pair, tuple)
        if pays(ms, dense(block)):
            result[block.convs[1]] = pair
    return result


@torch.no_grad()
def branch(model: nn.Module, branches: int, *, include: Iterable[str] | None = None) -> dict[str, float]:
    """Splits the core of every LowRankConv2d into groups, in place. Returns each core's relative error by what was dropped.

    Cores whose ranks ``branches`` does not divide are left as they are, and are not in the result.

    Args:
        include: names of the low-rank convolutions to split, as :func:`faster_branches` finds them; it may find none.

    Raises:
        ValueError: branches below 2, no core that it divides, or include names what is no low-rank convolution of the model.
    """
    errors: dict[str, float] = {}
    divided = _divided(model, branches)
    if include is not None:
        wanted = set(include)
        if not wanted:
            return errors
        known = {name for name, module in model.named_modules() if isinstance(module, LowRankConv2d)}
        if unknown := sorted(wanted - known):
            raise ValueError(
                f"effcore.branch: include names {unknown[0]!r}, which is not a low-rank convolution of the model"
            )
        divided = [(name, module) for name, module in divided if name in wanted]
    for name, module in divided:
        assert module.core is not None
        r1, r2 = module.ranks
        core = module.core.weight
        rows, columns = (
            order.to(core.device) for order in reorder(core.detach().double().square().sum((2, 3)), branches)
        )
        spec = module.spec() | {"branches": branches}
        new = LowRankConv2d(**spec, device=core.device, dtype=core.dtype)
        assert new.core is not None
        ordered = core[rows][:, columns].view(branches, r2 // branches, branches, r1 // branches, *core.shape[2:])
        new.core.weight.copy_(torch.cat([ordered[b, :, b] for b in range(branches)]))
        new.first.weight.copy_(module.first.weight[columns])
        new.last.weight.copy_(module.last.weight[:, rows])
        if new.last.bias is not None and module.last.bias is not None:
            new.last.bias.copy_(module.last.bias)
        for made, had in zip(new.parameters(), module.parameters(), strict=True):
            made.requires_grad_(had.requires_grad)
        errors[name] = relative_error(module.weight, new.weight)
        replace(model, name, as_laid_out(core, new).train(module.training))
    if not errors:
        raise ValueError(f"effcore.branch: no low-rank convolution has a core whose ranks {branches} divides")
    return errors


def _divided(model: nn.Module, branches: int) -> list[tuple[str, LowRankConv2d]]:
    """The low-rank convolutions with a whole core that can be split so."""
    if branches < 2:
        raise ValueError(f"effcore.branch: branches must be at least 2, got {branches}")
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LowRankConv2d)
        and module.core is not None
        and module.branches == 1
        and not any(r % branches for r in module.ranks)
    ]


@torch.no_grad()
def faster_branches(
    model: nn.Module, branches: int, data: Iterable[Any], *, measure: Literal["inference", "training"] = "inference"
) -> list[str]:
    """Names of the low-rank convolutions whose core runs faster in groups than whole, on the shapes that batches show.

    A GPU's library may well be slower with groups, for all that they compute less.

    Args:
        branches: as for :func:`branch`.
        data: a few batches, as :func:`effcore.decompose` takes them.
        measure: what is timed, inference or training.

    Raises:
        ValueError: branches below 2; data without a batch.
    """
    cores = {name: Layer(f"{name}.core", module.core, "conv") for name, module in _divided(model, branches)}  # type: ignore[arg-type]
    seen = observe(model, list(cores.values()), data, moments=False)
    clock = Clock(training=measure == "training")
    faster = []
    for name, layer in cores.items():
        if layer.name not in seen:
            continue
        whole: Any = layer.module
        split = Conv(
            whole.in_channels,
            whole.out_channels,
            whole.kernel_size,
            whole.stride,
            whole.padding,
            whole.dilation,
            branches,
            bias=False,
            padding_mode=whole.padding_mode,
            device=whole.weight.device,
            dtype=whole.weight.dtype,
        )
        split = as_laid_out(whole.weight, split)
        times = [
            clock((shape_key(layer), n), module, seen[layer.name]) for n, module in ((1, whole), (branches, split))
        ]
        if pays(times[1], times[0]):
            faster.append(name)
    return faster
