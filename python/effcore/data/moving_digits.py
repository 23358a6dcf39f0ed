"""Moving digits: a small video task that needs space and time, which digit it is and where it goes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# (dy, dx) of a step: right, down-right, down, ... clockwise.
DIRECTIONS = [(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)]


class MovingDigits:
    """Clips made while one trains: a handwritten digit (8² scans of scikit-learn's digits data, twice their size) crosses a
    noisy ground, leaving on one side and coming back on the other. No single frame says where it goes; a seed gives the same
    clips anywhere.

    Args:
        split: ``"train"``: 1,437 scans, or ``"test"``: the other 360.
        size: of a frame's side in pixels, at least 16.
        frames: of a clip, at least 2.
        noise: standard deviation of what is added to every pixel; white is 1.

    Raises:
        ValueError: an argument out of range.
        ImportError: scikit-learn, which has the scans, is not installed.
    """

    digits, directions, channels = 10, len(DIRECTIONS), 1

    def __init__(self, split: str = "train", size: int = 32, frames: int = 8, noise: float = 0.5):
        if split not in ("train", "test"):
            raise ValueError(f"effcore.MovingDigits: split must be 'train' or 'test', got {split!r}")
        if size < 16:
            raise ValueError(f"effcore.MovingDigits: size must be at least 16, got {size}")
        if frames < 2:
            raise ValueError(f"effcore.MovingDigits: frames must be at least 2, got {frames}")
        if not noise >= 0:
            raise ValueError(f"effcore.MovingDigits: noise must not be negative, got {noise}")
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "effcore.MovingDigits: the scans come with scikit-learn: pip install scikit-learn"
            ) from error
        scans = load_digits()
        part = slice(0, 1437) if split == "train" else slice(1437, None)
        images = torch.from_numpy(scans.images[part]).float()[:, None] / 16
        self.images = F.interpolate(images, scale_factor=2, mode="bilinear")[:, 0]  # [n, 16, 16]
        self.labels = torch.from_numpy(scans.target[part]).long()
        self.size, self.frames, self.noise = size, frames, noise

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``(clips [count, 1, frames, size, size], digits [count], directions [count])``."""

        def integers(below: int) -> Tensor:
            return torch.randint(0, below, (count,), generator=generator)

        chosen, direction, speed = integers(len(self.images)), integers(len(DIRECTIONS)), integers(2) + 1
        start = torch.stack([integers(self.size), integers(self.size)], 1)
        step = torch.tensor(DIRECTIONS)[direction] * speed[:, None]
        clips = self.noise * torch.randn(count, self.frames, self.size, self.size, generator=generator)
        batch, side = torch.arange(count)[:, None, None], torch.arange(self.images.shape[-1])
        for t in range(self.frames):
            at = start + t * step
            y = (at[:, 0, None, None] + side[None, :, None]) % self.size
            x = (at[:, 1, None, None] + side[None, None, :]) % self.size
            clips[:, t][batch, y, x] += self.images[chosen]
        return clips[:, None], self.labels[chosen], direction
