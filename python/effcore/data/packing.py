"""Windows of one length out of a stream of tokens, in an order that depends on a seed and nothing else.

Sample k of a training run is the same on every machine, process count and after every restart: resuming is an index.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from effcore.errors import InputError


class PackedTokens(Dataset):
    """Training samples ``{"input_ids", "labels"}``, int64 [length] each; the model shifts the labels.

    Documents follow each other in a window, each ended by its end-of-document token, as is usual in pretraining.

    Args:
        tokens: one-dimensional integer array, usually a memory map. It is cut into ``len(tokens) // length`` windows.
        length: tokens a window.
        samples: length of the dataset. Beyond the number of windows it begins anew, in another order. None: each window once.
        seed: of the order; None leaves the windows in place (validation).
        end_of_document: if given, samples carry ``position_ids`` that begin at 0 after this token; a model that sees them
            attends within documents only.

    Raises:
        InputError: fewer tokens than one window.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        length: int,
        *,
        samples: int | None = None,
        seed: int | None = None,
        end_of_document: int | None = None,
    ):
        self.windows = len(tokens) // length
        if self.windows == 0:
            raise InputError(
                f"the text has {len(tokens)} tokens, fewer than one window of {length}: add text or lower data.length"
            )
        self.tokens, self.length, self.seed, self.end_of_document = tokens, length, seed, end_of_document
        self.samples = self.windows if samples is None else samples
        self._epoch = -1
        self._order = np.arange(self.windows)

    def __len__(self) -> int:
        return self.samples

    def window_of(self, sample: int) -> int:
        """Which window is sample number ``sample``: a fresh permutation each time that all windows have been seen."""
        epoch, place = divmod(sample, self.windows)
        if self.seed is not None and epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.windows)
            self._epoch = epoch
        return int(self._order[place])

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        if not 0 <= sample < self.samples:
            raise IndexError(f"sample {sample} of {self.samples}")
        start = self.window_of(sample) * self.length
        ids = torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))
        item = {"input_ids": ids, "labels": ids}
        if self.end_of_document is not None:
            item["position_ids"] = document_positions(ids, self.end_of_document)
        return item


def document_positions(ids: torch.Tensor, end_of_document: int) -> torch.Tensor:
    """Positions within each document of a window: [5, E, 7, 8] -> [0, 1, 0, 1].

    Args:
        ids: int64 [length]; the end-of-document token E belongs to the document that it ends.
    """
    place = torch.arange(len(ids))
    first = torch.zeros_like(place)
    first[1:] = torch.where(ids[:-1] == end_of_document, place[1:], 0)
    return place - torch.cummax(first, dim=0).values


def spread(windows: int, wanted: int) -> np.ndarray:
    """``wanted`` window numbers (at most ``windows``) spread evenly over all: the validation set of a short evaluation."""
    return np.unique(np.linspace(0, windows - 1, min(windows, wanted)).round().astype(np.int64))
