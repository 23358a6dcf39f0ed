"""Recordings on their way from the device to the host: joined, copied beside the computation, read once they have arrived.

A copy that the host waits for would let the device run dry; one that is read some dozens of steps later costs neither time.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

Recording = tuple[Tensor, Tensor, Tensor | None]  # ids [B], values [B, W], counts [B]

PENDING = 64  # recordings that stay on their device before they are copied in one go


class Recordings:
    def __init__(self) -> None:
        self._pending: list[Recording] = []
        self._copies: list[_Copy] = []

    def add(self, ids: Tensor, values: Tensor, counts: Tensor | None) -> None:
        self._pending.append((ids.detach(), values.detach(), counts))

    def arrived(self) -> Iterator[Recording]:
        """Those on the host by now, in their order."""
        if len(self._pending) >= PENDING:
            yield from self._exchange()

    def everything(self) -> Iterator[Recording]:
        """All of them, waiting for those still on their way."""
        for _ in range(2):
            yield from self._exchange()

    def clear(self) -> None:
        self._pending, self._copies = [], []

    def _exchange(self) -> Iterator[Recording]:
        """Sends off what is pending; what was sent off before."""
        pending, self._pending, before = self._pending, [], self._copies
        self._copies = [_Copy(list(alike)) for _, alike in groupby(pending, _kind)]
        for copy in before:
            yield from copy.recordings()


def _kind(recording: Recording) -> tuple[object, ...]:
    """Recordings of one kind can be joined."""
    ids, values, counts = recording
    return values.shape[1], values.dtype, ids.device, values.device, None if counts is None else counts.device


class _Copy:
    def __init__(self, recordings: list[Recording]):
        self.sizes = [len(ids) for ids, _, _ in recordings]
        self.event: torch.cuda.Event | None = None
        self.ids = self._to_host([ids for ids, _, _ in recordings])
        self.values = self._to_host([values for _, values, _ in recordings])
        counts = [counts for _, _, counts in recordings if counts is not None]
        self.counts = self._to_host(counts) if counts else None

    def _to_host(self, parts: list[Tensor]) -> Tensor:
        joined = torch.cat(parts)
        if not joined.is_cuda:
            return joined.cpu()
        copied = joined.to("cpu", non_blocking=True)  # into pinned memory
        self.event = torch.cuda.Event()
        self.event.record(torch.cuda.current_stream(joined.device))
        return copied

    def recordings(self) -> Iterator[Recording]:
        """One, or where a sample occurs twice those that came."""
        if self.event is not None:
            self.event.synchronize()
        sizes = [len(self.ids)] if len(self.ids.unique()) == len(self.ids) else self.sizes
        counts = [None] * len(sizes) if self.counts is None else self.counts.split(sizes)
        yield from zip(self.ids.split(sizes), self.values.split(sizes), counts, strict=True)
