"""Pictures in folders named after their classes, as random batches: ``folder/cat/1.jpg``, ``folder/dog/2.png``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from effcore.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class ImageFolder:
    """Each tenth picture of a class, in the order of names, is of the test split.

    Args:
        split: ``"train"`` or ``"test"``. Training pictures are cropped and mirrored at random.
        size: side in pixels.

    Raises:
        InputError: not a folder, fewer than two classes, a class with fewer than two pictures, or a file that is no picture.
    """

    channels = 3

    def __init__(self, folder: str | Path, split: str = "train", size: int = 224):
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"--data {folder}: not a folder")
        self.names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if len(self.names) < 2:
            raise InputError(
                f"--data {folder}: expected a folder for each of at least 2 classes, found {len(self.names)}"
            )
        self.classes, self.size, self.training = len(self.names), size, split == "train"
        self.files: list[tuple[Path, int]] = []
        for label, name in enumerate(self.names):
            files = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES)
            if len(files) < 2:
                raise InputError(f"--data {folder}: class {name!r} has {len(files)} pictures but needs at least 2")
            self.files += [(f, label) for i, f in enumerate(files) if (i % 10 == 0) != self.training]

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``(images [count, 3, size, size] from -1 to 1, labels [count])``, drawn with replacement."""
        chosen = torch.randint(0, len(self.files), (count,), generator=generator).tolist()
        images = torch.stack([self._read(self.files[i][0], generator) for i in chosen])
        return images, torch.tensor([self.files[i][1] for i in chosen])

    def _read(self, file: Path, generator: torch.Generator | None) -> Tensor:
        import numpy
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(file) as opened:
                picture = opened.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"--data {file}: not a picture that can be read ({error})") from error
        share, along, across, mirrored = torch.rand(4, generator=generator).tolist()
        side = min(picture.size) * (0.7 + 0.3 * share if self.training else 1.0)
        free = [length - side for length in picture.size]
        left, top = (free[0] * along, free[1] * across) if self.training else (free[0] / 2, free[1] / 2)
        picture = picture.resize(
            (self.size, self.size), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
        )
        if self.training and mirrored < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
