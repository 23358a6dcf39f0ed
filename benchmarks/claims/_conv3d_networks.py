"""The networks of the 3D convolutions' claim, and the ways to build their convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcore.nn import conv3d as blocks

Make = Callable[..., nn.Module]  # (channels, outputs, stride=)


def normed(channels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm3d(channels), nn.ReLU(inplace=True))


METHODS: dict[str, Make] = {
    "Conv3D": lambda c, o, stride: nn.Conv3d(c, o, 3, stride, 1, bias=False),
    "R(2+1)D": lambda c, o, stride: blocks.R2Plus1DConv3d(c, o, stride=stride, bias=False, between=normed),
    "P3D-A": lambda c, o, stride: blocks.P3DConv3d(c, o, stride=stride, bias=False, kind="A", between=normed),
    "P3D-B": lambda c, o, stride: blocks.P3DConv3d(c, o, stride=stride, bias=False, kind="B", between=normed),
    "P3D-C": lambda c, o, stride: blocks.P3DConv3d(c, o, stride=stride, bias=False, kind="C", between=normed),
    "Cat": lambda c, o, stride: blocks.CatConv3d(c, o, stride=stride, bias=False),
    "Add": lambda c, o, stride: blocks.CrossConv3d(c, o, stride=stride, bias=False),
}


class BasicBlock(nn.Module):
    def __init__(self, make: Make, channels: int, outputs: int, stride: int):
        super().__init__()
        self.first = nn.Sequential(make(channels, outputs, stride=stride), normed(outputs))
        self.second = nn.Sequential(make(outputs, outputs, stride=1), nn.BatchNorm3d(outputs))
        plain = stride == 1 and channels == outputs
        self.shortcut = nn.Identity() if plain else nn.Conv3d(channels, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class Tail(nn.Sequential):
    """The 3D part of ECO-Lite: [B, 96, 16, 28, 28] to 101 classes."""

    def __init__(self, make: Make, width: int = 128):
        stages = [(96, width, 1), (width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)]
        stages += [(2 * width, 4 * width, 2), (4 * width, 4 * width, 1)]
        head = [nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4 * width, 101)]
        super().__init__(*(BasicBlock(make, *stage) for stage in stages), *head)


class UNetLevel(nn.Module):
    """[B, 64, T, H, W] to the logits of 4 classes a voxel."""

    def __init__(self, make: Make, width: int = 64):
        super().__init__()

        def pair(channels: int, outputs: int) -> nn.Module:
            widths = [(channels, outputs), (outputs, outputs)]
            return nn.Sequential(*(nn.Sequential(make(c, o, stride=1), normed(o)) for c, o in widths))

        self.down, self.inner, self.up = pair(width, width), pair(width, 2 * width), pair(2 * width, width)
        self.widen = nn.ConvTranspose3d(2 * width, width, 2, 2)
        self.head = nn.Conv3d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.down(x)
        inner = self.inner(F.max_pool3d(kept, 2))
        return self.head(self.up(torch.cat([kept, self.widen(inner)], 1)))


@dataclass
class Task:
    """A network, the size of its input, and the sizes of its labels and how many there are."""

    network: Callable[[Make], nn.Module]
    clip: tuple[int, ...]
    label: tuple[int, ...]
    classes: int


TASKS = {
    "speed": Task(Tail, (96, 16, 28, 28), (), 101),
    "unet": Task(UNetLevel, (64, 32, 64, 64), (32, 64, 64), 4),
}
