"""3D convolutions from a spatial (2D) and a temporal (1D) part, all with the interface of ``torch.nn.Conv3d``.

================== =============================================== ===========================
module             what it computes                                weights for k=3, O=C
================== =============================================== ===========================
CrossConv3d        S(x) + M(x), one pass ("Add")                    12 C²
CatConv3d          [S(x), M(x)], half of the channels each ("Cat")   6 C²
R2Plus1DConv3d     M(between(S(x))), as wide as a dense kernel      27 C²
P3DConv3d          A: M(S(x));  B: S(x) + M(x);  C: S(x) + M(S(x))  12 C²
PatchEmbed3d       stride = kernel: one matrix product, exact       as Conv3d
================== =============================================== ===========================

S is a convolution [1, kh, kw], M one of [kt, 1, 1]. Norm and activation stay where the host network has them; R(2+1)D and P3D
take what stands ``between`` their parts (nothing by default).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcore.ops.conv3d import cross_conv3d
from effcore.ops.patch_embed import patch_embed3d

__all__ = ["CatConv3d", "CrossConv3d", "P3DConv3d", "PatchEmbed3d", "R2Plus1DConv3d"]

Triple = int | Sequence[int]


def _triple(name: str, value: Triple) -> tuple[int, int, int]:
    values = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(values) != 3:
        raise ValueError(f"effcore.nn: {name} must be an int or 3 of them (t, h, w), got {value!r}")
    return values  # type: ignore[return-value]


class _Factorized(nn.Module):
    """What the modules share: sizes, checked; ``padding="same"`` is half of the kernel at any stride."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Triple,
        stride: Triple,
        padding: Triple | str,
        bias: bool,
    ):
        super().__init__()
        if min(in_channels, out_channels) < 1:
            raise ValueError(f"effcore.nn: there must be channels, got {in_channels} in and {out_channels} out")
        self.in_channels, self.out_channels, self.has_bias = in_channels, out_channels, bias
        self.kernel_size, self.stride = _triple("kernel_size", kernel_size), _triple("stride", stride)
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"effcore.nn: kernel_size must be odd (the parts share a middle), got {self.kernel_size}")
        if padding == "same":
            padding = tuple(k // 2 for k in self.kernel_size)
        elif isinstance(padding, str):
            raise ValueError(f"effcore.nn: padding must be 'same', an int or 3 of them (t, h, w), got {padding!r}")
        self.padding = _triple("padding", padding)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, bias={self.has_bias}"
        )

    def _spatial(self, inputs: int, outputs: int, *, bias: bool) -> nn.Conv3d:
        (_, kh, kw), (_, sh, sw), (_, ph, pw) = self.kernel_size, self.stride, self.padding
        return nn.Conv3d(inputs, outputs, (1, kh, kw), (1, sh, sw), (0, ph, pw), bias=bias)

    def _temporal(self, inputs: int, outputs: int, *, bias: bool) -> nn.Conv3d:
        kernel, stride, padding = self.kernel_size[0], self.stride[0], self.padding[0]
        return nn.Conv3d(inputs, outputs, (kernel, 1, 1), (stride, 1, 1), (padding, 0, 0), bias=bias)

    def _seen_by_temporal(self, x: Tensor) -> Tensor:
        """The voxels that a parallel temporal branch samples: the middles of the spatial kernel's windows."""
        return _sampled(x, (1, *self.kernel_size[1:]), (1, *self.stride[1:]), (0, *self.padding[1:]))

    def _seen_by_spatial(self, x: Tensor) -> Tensor:
        return _sampled(x, (self.kernel_size[0], 1, 1), (self.stride[0], 1, 1), (self.padding[0], 0, 0))


def _sampled(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """The voxels under the middle of a kernel: x[:, :, ::s, ::s, ::s] where padding is half of the kernel."""
    pads = [p for d in (2, 1, 0) for p in (max(padding[d] - kernel[d] // 2, 0),) * 2]
    if any(pads):
        x = F.pad(x, pads)
    for d in range(3):
        begin = max(kernel[d] // 2 - padding[d], 0)
        if begin or stride[d] > 1:
            x = x[(slice(None),) * (2 + d) + (slice(begin, x.shape[2 + d] - begin, stride[d]),)]
    return x


class CrossConv3d(_Factorized):
    """S(x) + M(x) in one pass: Conv3d with a cross-shaped kernel (:func:`effcore.cross_conv3d`).

    Args:
        aligned: both branches sample the same pixels, x[:, :, ::s, ::s, ::s]. False: the paper to the letter, in plain
            torch: its temporal branch is a 2D convolution with stride (s, s²) over [T, H·W], which at 28² and s=2 shares 7 % of
            its pixels with the spatial one, whose frames a learned 1×1 convolution of stride s thins out (``thin``). It needs
            stride (1, s, s) or (s, s, s), "same" padding, and H and W divisible by s.

    Weights: ``spatial`` [O, C, 1, kh, kw], ``temporal`` [O, C, kt, 1, 1], ``bias`` [O]: the shapes of the two ``nn.Conv3d``
    that it stands for (and of five dimensions, so that ``model.to(memory_format=torch.channels_last_3d)`` takes them).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Triple = 3,
        stride: Triple = 1,
        padding: Triple | str = "same",
        bias: bool = True,
        *,
        aligned: bool = True,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias)
        (kt, kh, kw), (st, sh, sw) = self.kernel_size, self.stride
        self.aligned = aligned or self.stride == (1, 1, 1)
        if not self.aligned and (sh != sw or st not in (1, sh) or self.padding != (kt // 2, kh // 2, kw // 2)):
            raise ValueError(
                "effcore.nn.CrossConv3d: aligned=False takes stride (1, s, s) or (s, s, s) and padding 'same', got stride "
                f"{self.stride} and padding {self.padding}"
            )
        self.spatial = nn.Parameter(torch.empty(out_channels, in_channels, 1, kh, kw))
        self.temporal = nn.Parameter(torch.empty(out_channels, in_channels, kt, 1, 1))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.thin = nn.Conv3d(out_channels, out_channels, 1, (st, 1, 1)) if not self.aligned and st > 1 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Both branches as torch initialises a convolution of all taps of the cross."""
        kt, kh, kw = self.kernel_size
        bound = 1 / math.sqrt(self.in_channels * (kh * kw + kt - 1))
        for weight in (self.spatial, self.temporal, self.bias):
            if weight is not None:
                nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        if self.aligned:
            # The CUDA kernels for float32 are there to be right; torch's run on TF32 where the user allows it.
            if x.is_cuda and x.dtype == torch.float32 and not torch.is_autocast_enabled("cuda"):
                return self._two_convolutions(x)
            spatial, temporal = self.spatial.squeeze(2), self.temporal.squeeze((3, 4))
            return cross_conv3d(x, spatial, temporal, self.bias, stride=self.stride, padding=self.padding)
        batch, channels, frames, height, width = x.shape
        (st, s, _), (pt, ph, pw) = self.stride, self.padding
        if height % s or width % s:
            raise ValueError(
                f"effcore.nn.CrossConv3d: aligned=False needs height and width divisible by {s}, got {height}x{width}"
            )
        across = F.conv3d(x, self.spatial, self.bias, (1, s, s), (0, ph, pw))
        if self.thin is not None:
            across = self.thin(across)
        lines = x.reshape(batch, channels, frames, height * width)
        along = F.conv2d(lines, self.temporal[..., 0], None, (st, s * s), (pt, 0))
        return across + along.view_as(across)

    def _two_convolutions(self, x: Tensor) -> Tensor:
        """The same function of both branches one by one."""
        (st, sh, sw), (pt, ph, pw) = self.stride, self.padding
        across = F.conv3d(self._seen_by_spatial(x), self.spatial, self.bias, (1, sh, sw), (0, ph, pw))
        return across + F.conv3d(self._seen_by_temporal(x), self.temporal, None, (st, 1, 1), (pt, 0, 0))


class CatConv3d(_Factorized):
    """[S(x), M(x)]: the spatial branch makes the first half of the output channels (the larger one), the temporal branch the
    others. The paper's Cat gives each branch ``out_channels`` of its own: ask for twice as many here."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Triple = 3,
        stride: Triple = 1,
        padding: Triple | str = "same",
        bias: bool = True,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias)
        if out_channels < 2:
            raise ValueError(f"effcore.nn.CatConv3d: out_channels must be at least 2, got {out_channels}")
        self.spatial = self._spatial(in_channels, out_channels - out_channels // 2, bias=bias)
        self.temporal = self._temporal(in_channels, out_channels // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.spatial(self._seen_by_spatial(x)), self.temporal(self._seen_by_temporal(x))], 1)


class R2Plus1DConv3d(_Factorized):
    """M(between(S(x))), Tran et al., CVPR 2018 (arXiv 1711.11248).

    Args:
        mid_channels: between the parts; by default as many as give the weights of a dense kernel,
            ⌊kt kh kw C O / (kh kw C + kt O)⌋.
        between: makes a module from the number of channels, e.g. ``lambda c: nn.Sequential(nn.BatchNorm3d(c), nn.ReLU())``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Triple = 3,
        stride: Triple = 1,
        padding: Triple | str = "same",
        bias: bool = True,
        *,
        mid_channels: int | None = None,
        between: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias)
        kt, kh, kw = self.kernel_size
        dense = kt * kh * kw * in_channels * out_channels
        mid = mid_channels or max(1, dense // (kh * kw * in_channels + kt * out_channels))
        self.spatial = self._spatial(in_channels, mid, bias=False)
        self.between = between(mid) if between is not None else nn.Identity()
        self.temporal = self._temporal(mid, out_channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal(self.between(self.spatial(x)))


class P3DConv3d(_Factorized):
    """The parts as in Pseudo-3D blocks (Qiu et al., ICCV 2017): ``kind`` "A" one after the other, "B" side by side, "C" both.

    Args:
        between: makes a module from the number of channels, applied to each part's output but the last sum.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Triple = 3,
        stride: Triple = 1,
        padding: Triple | str = "same",
        bias: bool = True,
        *,
        kind: str = "A",
        between: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias)
        if kind not in ("A", "B", "C"):
            raise ValueError(f"effcore.nn.P3DConv3d: kind must be 'A', 'B' or 'C', got {kind!r}")
        self.kind = kind
        self.spatial = self._spatial(in_channels, out_channels, bias=bias)
        self.temporal = self._temporal(in_channels if kind == "B" else out_channels, out_channels, bias=bias)
        self.between = between(out_channels) if between is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "B":
            across = self.between(self.spatial(self._seen_by_spatial(x)))
            return across + self.temporal(self._seen_by_temporal(x))
        across = self.between(self.spatial(x))
        along = self.temporal(across)
        return along if self.kind == "A" else self._seen_by_spatial(across) + along

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


class PatchEmbed3d(nn.Module):
    """Conv3d with stride = kernel and no padding, as one matrix product: the same function and the same state dict.

    Voxels that fill no patch at the far ends are left out, as Conv3d does. Convolutions fall onto slow paths here: in bfloat16
    some libraries are orders of magnitude behind the product.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Triple, bias: bool = True):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = _triple("kernel_size", kernel_size)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        bound = 1 / math.sqrt(in_channels * math.prod(self.kernel_size))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        return patch_embed3d(x, self.weight, self.bias)
