"""Convolutions of few channels as convolutions of many: those of some pixels side by side are the channels of one block.

In channels_last memory the block's channels are the same numbers in the same place, so nothing is moved but the weights, which
stand once for each pixel of a block, with zeros around. A GPU's libraries are made for 64 channels and more: with fewer they
take longer than with the zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NarrowConv2d", "block_weight", "blocks", "convolve_pairs", "narrow", "pixels"]

NARROW = 32  # channels, at which two pixels side by side are faster than one


def blocks(x: Tensor, count: int) -> Tensor:
    """Pixels [B, H, W, C] as blocks of ``count`` in a row: [B, count · C, H, W / count], channels_last."""
    return x.unflatten(2, (-1, count)).flatten(3).permute(0, 3, 1, 2)


def pixels(y: Tensor, count: int) -> Tensor:
    """Blocks [B, count · C, H, W] as pixels [B, H, count · W, C]."""
    return y.permute(0, 2, 3, 1).unflatten(3, (count, -1)).flatten(2, 3)


def block_weight(weight: Tensor, count: int, taps: int, first: int) -> Tensor:
    """A kernel of pixels [O, C, kh, kw] as one of blocks [count · O, count · C, kh, taps].

    The kernel of a block's first pixel begins at the ``first`` pixel of the ``taps`` blocks, the next one's a pixel later.
    """
    behind = count * taps - weight.shape[3] - first
    moved = torch.stack([F.pad(weight, (first + n, behind - n)) for n in range(count)])
    of_blocks = moved.flatten(0, 1).unflatten(3, (taps, count)).permute(0, 4, 1, 2, 3).flatten(1, 2)
    return of_blocks.contiguous(memory_format=torch.channels_last)


def convolve_pairs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv(x) of 3×3, stride 1 and padding 1, over pairs of pixels: x [B, C, H, W], channels_last, W even."""
    twice = None if bias is None else bias.repeat(2)
    y = F.conv2d(blocks(x.permute(0, 2, 3, 1), 2), block_weight(weight, 2, 3, 1), twice, padding=1)
    return pixels(y, 2).permute(0, 3, 1, 2)


class NarrowConv2d(nn.Conv2d):
    """``nn.Conv2d`` of at most 32 channels; 3×3 over channels_last pixels of a GPU in half precision, over pairs of them."""

    @classmethod
    def serves(cls, conv: nn.Conv2d) -> bool:
        """Whether it has another way to compute this convolution."""
        same = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "padding_mode": "zeros"}
        narrow = max(conv.in_channels, conv.out_channels) <= NARROW and conv.groups == 1
        return narrow and all(getattr(conv, name) == value for name, value in same.items())

    def forward(self, x: Tensor) -> Tensor:
        half = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.dtype == self.weight.dtype
        if not half or x.dim() != 4 or x.shape[3] % 2 or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        return convolve_pairs(x, self.weight, self.bias)


def narrow(conv: nn.Conv2d) -> nn.Conv2d:
    """Makes a convolution a :class:`NarrowConv2d` where that has another way to compute it."""
    if type(conv) is nn.Conv2d and NarrowConv2d.serves(conv):
        conv.__class__ = NarrowConv2d
    return conv
