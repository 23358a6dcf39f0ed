"""Cluttered digits: a small task for vision transformers on which it matters where one looks.

A 64² picture holds one whole handwritten digit (8² scans of scikit-learn's digits data, twice their size) somewhere among
pieces of other digits and noise. Most patches say nothing about the class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class ClutteredDigits:
    """Pictures made while one trains: no two batches are the same, and a seed gives the same ones anywhere.

    Args:
        split: ``"train"``: 1,437 scans, or ``"test"``: the other 360.
        size: of a picture's side in pixels, at least 16.
        clutter: pieces of other digits in a picture.
        device: where pictures are made; the same seed gives other pictures on a GPU.

    Raises:
        ValueError: an argument out of range.
        ImportError: scikit-learn, which has the scans, is not installed.
    """

    classes, channels = 10, 1

    def __init__(self, split: str = "train", size: int = 64, clutter: int = 4, device: str = "cpu"):
        if split not in ("train", "test"):
            raise ValueError(f"effcore.ClutteredDigits: split must be 'train' or 'test', got {split!r}")
        if size < 16:
            raise ValueError(f"effcore.ClutteredDigits: size must be at least 16, got {size}")
        if clutter < 0:
            raise ValueError(f"effcore.ClutteredDigits: clutter must not be negative, got {clutter}")
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "effcore.ClutteredDigits: the scans come with scikit-learn: pip install scikit-learn"
            ) from error
        scans = load_digits()
        part = slice(0, 1437) if split == "train" else slice(1437, None)
        images = torch.from_numpy(scans.images[part]).float()[:, None] / 16
        self.digits = F.interpolate(images, scale_factor=2, mode="bilinear")[:, 0].to(device)  # [n, 16, 16]
        self.labels = torch.from_numpy(scans.target[part]).long().to(device)
        self.size, self.clutter = size, clutter

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``(images [count, 1, size, size] from -1 to 1, labels [count])``; the generator is on this object's device."""
        device = self.digits.device

        def integers(below: int, *shape: int) -> Tensor:
            return torch.randint(0, below, shape, generator=generator, device=device)

        chosen = integers(len(self.digits), count)
        canvas = 0.15 * torch.rand(count, self.size, self.size, generator=generator, device=device)
        piece = 7
        for _ in range(self.clutter):
            others, rows, columns = (
                integers(len(self.digits), count),
                integers(16 - piece, count),
                integers(16 - piece, count),
            )
            cut = _windows(self.digits[others], rows, columns, piece)
            self._paste(canvas, cut, integers(self.size - piece + 1, count), integers(self.size - piece + 1, count))
        side = self.digits.shape[-1]
        digits = self.digits[chosen]
        self._paste(canvas, digits, integers(self.size - side + 1, count), integers(self.size - side + 1, count))
        return (canvas * 2 - 1)[:, None], self.labels[chosen]

    @staticmethod
    def _paste(canvas: Tensor, pieces: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Each piece over its picture: the brighter of the two counts."""
        side = pieces.shape[-1]
        batch = torch.arange(len(canvas), device=canvas.device)[:, None, None]
        y = rows[:, None, None] + torch.arange(side, device=rows.device)[None, :, None]
        x = columns[:, None, None] + torch.arange(side, device=rows.device)[None, None, :]
        canvas[batch, y, x] = torch.maximum(canvas[batch, y, x], pieces)


def _windows(images: Tensor, rows: Tensor, columns: Tensor, side: int) -> Tensor:
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    y = rows[:, None, None] + torch.arange(side, device=rows.device)[None, :, None]
    x = columns[:, None, None] + torch.arange(side, device=rows.device)[None, None, :]
    return images[batch, y, x]
