"""How far each sample's outputs moved between its last two recordings, known to all processes alike."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from effcore.methods import importance
from effcore.methods._gather import Processes
from effcore.methods._recordings import Recording, Recordings


class Changes:
    """Outputs and their changes, by sample.

    Args:
        samples: N.
        most: recordings of a sample that count; later ones are of a drawn epoch that arrives late, or duplicates that fill up a
            batch. None: all count.

    Attributes:
        change: ‖P_i − P'_i‖² of the last two recordings (for language models a token's mean), float32 [N]; NaN before two.
        values: P_i as recorded last, float32 [N, W]; W is the widest recording's, narrower ones are padded with zeros.
        recordings: how many there are, uint8 [N].
    """

    def __init__(self, samples: int, processes: Processes, most: int | None):
        self.samples, self.most = samples, most
        self._processes = processes
        self.values = torch.empty(samples, 0)
        self.change = torch.full((samples,), torch.nan)
        self.recordings = torch.zeros(samples, dtype=torch.uint8)
        self._fresh = torch.zeros(samples, dtype=torch.bool)  # recorded here, unknown to the other processes
        self._coming = Recordings()
        self._warned = False

    def record(self, ids: Tensor, values: Tensor, counts: Tensor | None) -> None:
        """Sends ids [B], values [B, W] and token counts [B] on their way to the host, and stores what has arrived there."""
        self._coming.add(ids, values, counts)
        self._take(self._coming.arrived())

    def store(self, ids: Tensor, values: Tensor, counts: Tensor | None) -> None:
        """Values on the host: each is the sample's new P_i, and its distance from the one before the change."""
        finite = values.isfinite().all(1)
        if not finite.all():
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"effcore.SwiftLearnSampler: outputs of sample {int(ids[~finite][0])} are not finite; "
                    "such recordings are left out",
                    stacklevel=5,
                )
            ids, values, counts = ids[finite], values[finite], None if counts is None else counts.cpu()[finite]
        self._widen(values.shape[1])
        if values.shape[1] < self.values.shape[1]:
            values = torch.nn.functional.pad(values, (0, self.values.shape[1] - values.shape[1]))
        known = self.recordings[ids] > 0
        again = ids[known]
        tokens = None if counts is None else counts.cpu()[known]
        self.change[again] = importance.squared_change(values[known], self.values[again], tokens)
        self.values[ids] = values
        self.recordings[ids] = (self.recordings[ids] + 1).clamp(max=254)
        self._fresh[ids] = True

    def share(self) -> None:
        """All processes learn what each has recorded; all call it together."""
        self._take(self._coming.everything())
        if self._processes.count == 1:
            return
        ids = self._fresh.nonzero().flatten()
        self._widen(self._processes.maximum(self.values.shape[1]))
        ids, values, change, recordings = self._processes.gather(
            ids, self.values[ids], self.change[ids], self.recordings[ids]
        )
        self.values[ids], self.change[ids], self.recordings[ids] = values, change, recordings
        self._fresh.zero_()

    def state_dict(self, *, with_values: bool) -> dict[str, Tensor]:
        """Without values where no recording will follow, which would need them."""
        values = self.values if with_values else self.values[:, :0]
        return {"values": values, "change": self.change, "recordings": self.recordings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values, self.change = state["values"].clone(), state["change"].clone()
        self.recordings = state["recordings"].clone()
        self._coming.clear()
        self._fresh.zero_()

    def _take(self, recordings: Iterable[Recording]) -> None:
        for ids, values, counts in recordings:
            ids, values = ids.long(), values.float()
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.samples:
                raise ValueError(
                    f"effcore.SwiftLearnSampler.record: sample numbers must be from 0 to {self.samples - 1}, got "
                    f"{int(ids.min())} to {int(ids.max())}"
                )
            if self.most is not None:
                due = self.recordings[ids] < self.most
                ids, values, counts = ids[due], values[due], None if counts is None else counts[due]
            self.store(ids, values, counts)

    def _widen(self, width: int) -> None:
        held = self.values.shape[1]
        if width > held:
            self.values = torch.nn.functional.pad(self.values, (0, width - held))
