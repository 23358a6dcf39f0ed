"""Layers whose weight is kept as a product of small factors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcore.ops.lowrank import lowrank_linear, stays_on_chip

Pair = tuple[int, int]


def _pair(x: int | Pair) -> Pair:
    return (x, x) if isinstance(x, int) else (int(x[0]), int(x[1]))


FEW = 16384  # pixels, for which cuDNN's gradient of a 1×1 weight takes 25 us on an H200 where a product's takes 15


def _is_linear(pointwise: nn.Conv2d) -> bool:
    return pointwise.stride == (1, 1) and pointwise.padding in ("valid", "same", (0, 0))


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1×1 convolution; trained on few channels_last pixels of a GPU, as a product of their rows."""
    if not (x.is_cuda and conv.weight.requires_grad and torch.is_grad_enabled() and _is_linear(conv)):
        return conv(x)
    if x.dim() != 4 or x.numel() > FEW * x.shape[1] or not x.is_contiguous(memory_format=torch.channels_last):
        return conv(x)
    if conv._forward_hooks or conv._forward_pre_hooks:
        return conv(x)
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


class LowRankLinear(nn.Module):
    """``nn.Linear`` with the weight up · down: x [..., in_features] -> [..., out_features].

    Args:
        rank: r of down [r, in_features] and up [out_features, r]; at least 1, at most min(in_features, out_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"effcore.LowRankLinear: rank must be from 1 to {min(in_features, out_features)} for "
                f"{in_features} -> {out_features} features, got {rank}"
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(rank, in_features, **factory))
        self.up = nn.Parameter(torch.empty(out_features, rank, **factory))
        self.bias = nn.Parameter(torch.zeros(out_features, **factory)) if bias else None
        nn.init.normal_(self.down, std=in_features**-0.5)
        nn.init.normal_(self.up, std=rank**-0.5)

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_features, in_features], computed."""
        return self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        return lowrank_linear(x, self.down, self.up, self.bias)

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "bias": self.bias is not None,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.spec().items())


class LowRankConv2d(nn.Module):
    """A convolution as 1×1 (in -> r1), k×k core (r1 -> r2), 1×1 (r2 -> out): Tucker-2 on the channel modes.

    A 1×1 convolution needs no core: ``ranks`` is (r, r) and the two 1×1 convolutions are all there is.

    Args:
        ranks: (r1, r2), at most the channels in and out.
        branches: groups of the core; both ranks are multiples of it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        ranks: Pair,
        *,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        branches: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        kernel = _pair(kernel_size)
        r1, r2 = (int(r) for r in ranks)
        for r, channels, what in ((r1, in_channels, "in_channels"), (r2, out_channels, "out_channels")):
            if not 1 <= r <= channels:
                raise ValueError(
                    f"effcore.LowRankConv2d: ranks must be from 1 to {what} ({channels}), got ({r1}, {r2})"
                )
        pointwise = kernel == (1, 1)
        if pointwise and (r1 != r2 or branches != 1):
            raise ValueError(
                f"effcore.LowRankConv2d: a 1x1 convolution has one rank and no branches, got ({r1}, {r2}), {branches}"
            )
        if branches < 1 or r1 % branches or r2 % branches:
            raise ValueError(f"effcore.LowRankConv2d: branches must divide both ranks ({r1}, {r2}), got {branches}")
        self.in_channels, self.out_channels, self.kernel_size, self.ranks = in_channels, out_channels, kernel, (r1, r2)
        self.branches = branches
        where: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "padding_mode": padding_mode,
        }
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        # A stride costs least where it comes first: a pointwise pair strides before its first product.
        self.first = nn.Conv2d(in_channels, r1, 1, bias=False, **(where if pointwise else {}), **factory)
        self.core = None if pointwise else nn.Conv2d(r1, r2, kernel, groups=branches, bias=False, **where, **factory)
        self.last = nn.Conv2d(r2, out_channels, 1, bias=bias, **factory)

    @property
    def weight(self) -> Tensor:
        """The dense kernel [out_channels, in_channels, kh, kw], computed."""
        first, last = self.first.weight[:, :, 0, 0], self.last.weight[:, :, 0, 0]
        if self.core is None:
            return (last @ first)[:, :, None, None]
        return torch.einsum("op,pqhw,qi->oihw", last, self.dense_core(), first)

    def dense_core(self) -> Tensor:
        """The core [r2, r1, kh, kw] with the zeros between its branches written out."""
        assert self.core is not None
        core = self.core.weight
        if self.branches == 1:
            return core
        blocks = core.flatten(2).view(self.branches, -1, *core.flatten(2).shape[1:]).unbind(0)
        return torch.stack(
            [torch.block_diag(*(b[..., i] for b in blocks)) for i in range(blocks[0].shape[-1])], -1
        ).view(self.ranks[1], self.ranks[0], *self.kernel_size)

    @property
    def bias(self) -> Tensor | None:
        """[out_channels], that of the last convolution."""
        return self.last.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.core is not None:
            return _pointwise(self.last, self.core(_pointwise(self.first, x)))
        if self._is_linear and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            # A linear layer on pixels whose channels lie together: where one kernel does both products, it takes them as rows.
            rows, down, up = x.permute(0, 2, 3, 1), self.first.weight.flatten(1), self.last.weight.flatten(1)
            if stays_on_chip(rows, down, up):
                return lowrank_linear(rows, down, up, self.last.bias).permute(0, 3, 1, 2)
        return _pointwise(self.last, _pointwise(self.first, x))

    @property
    def _is_linear(self) -> bool:
        return _is_linear(self.first)

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        where = self.first if self.core is None else self.core
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "ranks": list(self.ranks),
            "stride": list(where.stride),
            "padding": where.padding if isinstance(where.padding, str) else list(where.padding),
            "dilation": list(where.dilation),
            "branches": self.branches,
            "bias": self.last.bias is not None,
            "padding_mode": where.padding_mode,
        }

    def extra_repr(self) -> str:
        return f"ranks={self.ranks}, branches={self.branches}"


__all__ = ["LowRankConv2d", "LowRankLinear"]
