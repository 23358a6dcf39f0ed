"""Which layers of a model can be decomposed, their weights, what takes their place, and which of its factors are frozen."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from effcore.methods.low_rank_factor import KernelFactors, MatrixFactors, svd_rank, tucker_ranks
from effcore.nn.low_rank import LowRankConv2d, LowRankLinear
from effcore.nn.side_by_side import NarrowConv2d

M = TypeVar("M", bound=nn.Module)
Kind = Literal["linear", "conv1d", "pointwise", "conv"]
Rank = int | tuple[int, int]
# An image's colours or ten classes have no low rank to speak of; such layers are decomposed only where they are named.
FEW = 16


@dataclass
class Layer:
    """A dense layer: its weight as [out, in] or [out, in, kh, kw]."""

    name: str
    module: nn.Module
    kind: Kind

    @property
    def weight(self) -> Tensor:
        w: Any = self.module.weight
        if self.kind == "conv1d":
            return w.T
        return w[:, :, 0, 0] if self.kind == "pointwise" else w

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def most(self) -> Rank:
        """The greatest rank(s)."""
        out, features = self.weight.shape[:2]
        return (features, out) if self.kind == "conv" else min(features, out)

    @property
    def parameters(self) -> int:
        return self.weight.numel()

    def parameters_at(self, rank: Rank) -> int:
        out, features = self.weight.shape[:2]
        if isinstance(rank, tuple):
            return features * rank[0] + self.weight[0, 0].numel() * rank[0] * rank[1] + rank[1] * out
        return rank * (out + features)

    def rank_at(self, ratio: float) -> Rank:
        out, features = self.weight.shape[:2]
        if self.kind == "conv":
            return tucker_ranks(features, out, self.weight[0, 0].numel(), ratio)
        return svd_rank(out, features, ratio)

    def factors(self, moments: Tensor | None = None) -> MatrixFactors | KernelFactors:
        return (KernelFactors if self.kind == "conv" else MatrixFactors).of(self.weight, moments)

    def check(self, rank: Rank) -> None:
        """Raises ValueError where the layer has no such rank."""
        wanted = 2 if self.kind == "conv" else 1
        ranks, most = (x if isinstance(x, tuple) else (x,) for x in (rank, self.most))
        if len(ranks) != wanted or any(isinstance(r, bool) or not isinstance(r, int) for r in ranks):
            form = "a pair of integers (r1, r2)" if wanted == 2 else "an integer"
            raise ValueError(f"effcore.decompose: the rank of {self.name} must be {form}, got {rank!r}")
        if any(not 1 <= r <= m for r, m in zip(ranks, most, strict=True)):
            limit = " and ".join(f"1 to {m}" for m in most)
            raise ValueError(f"effcore.decompose: the rank of {self.name} must be from {limit}, got {rank}")

    def empty(self, rank: Rank) -> LowRankLinear | LowRankConv2d:
        """The decomposed layer with weights yet to be written."""
        w = self.weight
        factory: dict[str, Any] = {"device": w.device, "dtype": w.dtype}
        if self.kind in ("linear", "conv1d"):
            assert isinstance(rank, int)
            return LowRankLinear(w.shape[1], w.shape[0], rank, self.bias is not None, **factory)
        conv = self.module
        assert isinstance(conv, nn.Conv2d)
        ranks = rank if isinstance(rank, tuple) else (rank, rank)
        new = LowRankConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            ranks,
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            **factory,
        )
        return as_laid_out(conv.weight, new)

    @torch.no_grad()
    def build(self, rank: Rank, factors: MatrixFactors | KernelFactors) -> LowRankLinear | LowRankConv2d:
        """The decomposed layer, bias, mode and requires_grad as the dense one has them."""
        new = self.empty(rank)
        if isinstance(new, LowRankLinear):
            assert isinstance(factors, MatrixFactors) and isinstance(rank, int)
            down, up = factors.split(rank)
            new.down.copy_(down), new.up.copy_(up)
            bias: Tensor | None = new.bias
        else:
            if isinstance(factors, MatrixFactors):
                assert isinstance(rank, int)
                first, last = factors.split(rank)
            else:
                assert isinstance(rank, tuple) and new.core is not None
                first, core, last = factors.split(rank)
                new.core.weight.copy_(core)
            new.first.weight.copy_(first[:, :, None, None])
            new.last.weight.copy_(last[:, :, None, None])
            bias = new.last.bias
        if bias is not None and self.bias is not None:
            bias.copy_(self.bias)
        new.requires_grad_(self.module.weight.requires_grad)  # type: ignore[union-attr, arg-type]
        if bias is not None and self.bias is not None:
            bias.requires_grad_(self.bias.requires_grad)
        return new.train(self.module.training)


def _kind(module: nn.Module) -> Kind | None:
    if type(module) is nn.Linear:
        return "linear"
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers"):
        return "conv1d"
    if isinstance(module, nn.Conv2d) and type(module) in (nn.Conv2d, NarrowConv2d):
        return "pointwise" if tuple(module.kernel_size) == (1, 1) else "conv"
    return None


def find(
    model: nn.Module, include: Iterable[str] | None = None, exclude: Iterable[str] = ()
) -> tuple[list[Layer], dict[str, str]]:
    """The layers to decompose, and for each other one that has the form of one the reason why it stays dense.

    ``include`` and ``exclude`` are regular expressions that are searched for in layer names. A weight that two modules share
    stays shared: its layers stay dense, and are refused where ``include`` names one of them.

    Raises:
        ValueError: weights that are quantised, sparse, not loaded (meta device) or not finite, what is no regular expression,
            or an ``include`` that matches nothing.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    wanted, unwanted = None if include is None else list(include), list(exclude)
    for pattern in [*(wanted or ()), *unwanted]:
        try:
            re.compile(pattern)
        except re.error as bad:
            raise ValueError(f"effcore.decompose: {pattern!r} is no regular expression: {bad}") from None
    used: set[str] = set()
    layers: list[Layer] = []
    stay: dict[str, str] = {}
    attention = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}

    for name, module in model.named_modules():
        kind = _kind(module)
        quantised = "quantized" in type(module).__module__ or type(module).__module__.startswith("bitsandbytes")
        linear_like = isinstance(module, nn.Linear | nn.Conv2d) or quantised
        if kind is None and not linear_like:
            continue
        matches = None if wanted is None else [p for p in wanted if re.search(p, name)]
        if matches is not None:
            used.update(matches)
            if not matches:
                stay[name] = "not included"
                continue
        if any(re.search(p, name) for p in unwanted):
            stay[name] = "excluded"
            continue
        weight = getattr(module, "weight", None)
        if quantised or (isinstance(weight, Tensor) and not weight.is_floating_point()):
            raise ValueError(
                f"effcore.decompose: {name} has quantised weights ({type(module).__name__}); decompose the model first"
            )
        if kind is None or id(module) in attention:
            stay[name] = f"a {type(module).__name__}" if kind is None else "read by nn.MultiheadAttention itself"
            continue
        assert isinstance(weight, Tensor)
        if nn.utils.parametrize.is_parametrized(module):
            stay[name] = "parametrized"
            continue
        if weight.is_meta:
            raise ValueError(f"effcore.decompose: the weights of {name} are on the meta device; load them first")
        if weight.layout != torch.strided:
            raise ValueError(f"effcore.decompose: {name} has sparse weights ({weight.layout}); use .to_dense() first")
        if getattr(module, "groups", 1) != 1:
            stay[name] = f"{module.groups} groups"
            continue
        shared = [o for o in owners.get(id(weight), []) if o != f"{name}.weight"]
        if shared:
            if matches is not None:
                raise ValueError(
                    f"effcore.decompose: {name} shares its weight with {', '.join(shared)}: decomposing one would untie them"
                )
            stay[name] = f"shares its weight with {', '.join(shared)}"
            continue
        if matches is None and min(weight.shape[:2]) < FEW:
            stay[name] = f"fewer than {FEW} channels on one side"
            continue
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise ValueError(f"effcore.decompose: {name}.weight holds NaN or infinities")
        layers.append(Layer(name, module, kind))
    for pattern in wanted or ():
        if pattern not in used:
            raise ValueError(f"effcore.decompose: include {pattern!r} matches no linear or convolution layer")
    return layers, stay


def as_laid_out(weight: Tensor, new: M) -> M:
    """``new`` in channels_last where a convolution's ``weight`` is; that of a 1×1 convolution says neither."""
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        return new.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return new


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent = model.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], new)


def _outer(module: nn.Module) -> list[Tensor]:
    """The factors that freezing keeps: the first of two, the two 1×1s of three."""
    if isinstance(module, LowRankLinear):
        return [module.down]
    if isinstance(module, LowRankConv2d):
        return [module.first.weight] if module.core is None else [module.first.weight, module.last.weight]
    return []


def _inner(module: nn.Module) -> list[Tensor]:
    if isinstance(module, LowRankLinear):
        return [module.up]
    if isinstance(module, LowRankConv2d):
        return [module.last.weight] if module.core is None else [module.core.weight]
    return []


def freeze(model: nn.Module, frozen: bool = True, *, inner: bool = False) -> int:
    """Stops (or resumes) the training of all outer factors, or of the inner ones; returns how many parameters that are."""
    count = 0
    for module in model.modules():
        for parameter in (_inner if inner else _outer)(module):
            parameter.requires_grad_(not frozen)
            if frozen:
                parameter.grad = None
            count += parameter.numel()
    return count
