"""The cache of FlowHN models: for each block the keys and values of the tokens that its attention took, and the SSM's state.

The dynamic form grows (by half, so that appending is amortised). The static one is allocated once and counts its tokens on the
device as well, so that a step of one token a row can be captured in a CUDA graph (flowhn_steps.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from effcore.models.flowhn_config import FlowHNConfig
from effcore.models.flowhn_routes import Part, Router
from effcore.models.flowhn_steps import StepGraphs


class BlockStore:
    """What one block remembers. Keys and values lie in padded buffers [B, Hkv, capacity, D], each row with its own length.

    Args:
        capacity: tokens of a row that attention may take; None: as many as come.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity, self.is_static = capacity, capacity is not None
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.lengths: list[int] = []
        self.convolution: Tensor | None = None  # [B, width - 1, E]
        self.state: Tensor | None = None  # [B, E, N]
        self._counts: Tensor | None = None  # lengths on the device, int32 [B]
        self._counted: list[int] = []  # what they say

    def append(self, keys: Tensor, values: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """Writes new keys and values behind each row's own; returns the padded buffers up to the longest row.

        ``keys``, ``values``: [B, Hkv, K, D], or [1, Hkv, K, D] of packed rows.
        """
        past = self.lengths or [0] * len(part.counts)
        self.lengths = [a + b for a, b in zip(past, part.counts, strict=True)]
        end = max(self.lengths)
        self.keys = self._grown(self.keys, keys, len(past), max(past), end)
        self.values = self._grown(self.values, values, len(past), max(past), end)
        for buffer, new in ((self.keys, keys), (self.values, values)):
            if part.packed:
                buffer[part.rows, :, self.slots(past, part)] = new.detach()[0].transpose(0, 1)
            else:
                buffer[:, :, past[0] : end] = new.detach()
        return self.keys[:, :, :end], self.values[:, :, :end]

    @torch.compiler.disable
    def append_one(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token a row, rows of equal lengths, in a static store: whole padded buffers, and the lengths on the device."""
        batch = keys.shape[0]
        self.lengths = self.lengths or [0] * batch
        self.keys = self._grown(self.keys, keys, batch, 0, 1)
        self.values = self._grown(self.values, values, batch, 0, 1)
        counts = self.counts(keys.device)
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer.index_copy_(2, counts[:1].long(), new)
        self.advance()
        return self.keys, self.values, counts.add_(1)

    def advance(self) -> None:
        """One more token a row, on the device as well."""
        self.lengths = self._counted = [n + 1 for n in self.lengths]

    def counts(self, device: torch.device) -> Tensor:
        """The lengths on the device, always in the same place."""
        if self._counts is None or self._counts.shape[0] != len(self.lengths):
            self._counts, self._counted = torch.tensor(self.lengths, dtype=torch.int32, device=device), self.lengths
        elif self._counted != self.lengths:
            self._counts.copy_(torch.tensor(self.lengths, dtype=torch.int32))
            self._counted = self.lengths
        return self._counts

    @torch.compiler.disable
    def keep(self, convolution: Tensor, state: Tensor) -> None:
        """The SSM's state behind this pass; in a static store always in the same place."""
        if not self.is_static:
            self.convolution, self.state = convolution, state
        elif self.state is None or self.state.shape != state.shape or self.convolution is None:
            self.convolution, self.state = convolution.clone(), state.clone()
        else:
            self.convolution.copy_(convolution)
            self.state.copy_(state)

    @staticmethod
    def slots(first: list[int], part: Part) -> Tensor:
        """int64 [K]: the place of each packed token in its row, counted from ``first`` of the row."""
        assert part.rows is not None
        parts = [torch.arange(f, f + n) for f, n in zip(first, part.counts, strict=True)]
        return torch.cat(parts).to(part.rows.device)

    def _grown(self, buffer: Tensor | None, new: Tensor, batch: int, held: int, end: int) -> Tensor:
        if buffer is not None and end <= buffer.shape[2]:
            return buffer
        capacity = self.capacity or (end if buffer is None else max(end, held + held // 2 + 64))
        grown = new.new_zeros((batch, new.shape[1], capacity, new.shape[3]))
        if buffer is not None:
            grown[:, :, :held] = buffer[:, :, :held]
        return grown

    def map(self, function: Any) -> None:
        for name in ("keys", "values", "convolution", "state"):
            t = getattr(self, name)
            setattr(self, name, None if t is None else function(t))


class FlowHNCache(Cache):
    """Grows with the tokens that attention takes; the SSM's part is constant. Made by the model, or by hand for one generation.

    Args:
        config: of the model.
        max_cache_len: tokens of a row that a *static* cache takes. Steps of one token a row, all rows at the same position,
            are then replayed from CUDA graphs on a GPU. None: a dynamic cache.

    Attributes:
        length: columns of tokens seen, padding included (what ``attention_mask`` spans).
        positions: tokens of each row seen, padding left out: the position of its next one.
    """

    def __init__(self, config: FlowHNConfig, max_cache_len: int | None = None):
        self.max_cache_len = max_cache_len
        capacity = None if max_cache_len is None else Router(config).attended(max_cache_len)
        self.stores = [BlockStore(capacity) for _ in range(config.num_hidden_layers)]
        self.length = 0
        self.positions: list[int] = []
        self.graphs = StepGraphs()
        super().__init__(layers=self.stores)  # type: ignore[arg-type]

    @property
    def is_static(self) -> bool:
        return self.max_cache_len is not None

    def check_room(self, positions: list[int]) -> None:
        """Raises ValueError where rows that end at these positions do not fit."""
        if self.max_cache_len is not None and max(positions, default=0) > self.max_cache_len:
            raise ValueError(
                f"effcore.FlowHNCache: the static cache holds {self.max_cache_len} tokens of a row, got {max(positions)}"
            )

    def commit(self, columns: int, positions: list[int]) -> None:
        """A pass is done."""
        self.length += columns
        self.positions = positions

    def bytes(self) -> int:
        """What it takes now."""
        held = [t for s in self.stores for t in (s.keys, s.values, s.convolution, s.state) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)

    # ---------------------------------------------------------------- transformers' Cache interface

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("effcore.FlowHNCache works with FlowHN models only")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.length > 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused for good: what a recurrent state has taken in it cannot give back. ``is_croppable`` says so to generation,
        which asks before it drafts tokens."""
        raise RuntimeError("effcore.FlowHNCache.crop: a recurrent state cannot forget its last tokens")

    def reset(self) -> None:
        for store in self.stores:
            store.__init__(store.capacity)  # type: ignore[misc]
        self.length, self.positions, self.graphs = 0, [], StepGraphs()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was (beam search)."""
        self._select(beam_idx, in_place=self.is_static)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices, in_place=False)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(len(self.positions)).repeat_interleave(repeats), in_place=False)

    def _select(self, rows: Tensor, *, in_place: bool) -> None:
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        in_place = in_place and rows.shape[0] == len(self.positions)
        alike = len(set(self.positions)) <= 1  # then no row needs to be read on the host
        order = [0] * rows.shape[0] if alike else rows.tolist()

        def select(t: Tensor) -> Tensor:
            chosen = t.index_select(0, rows.to(t.device))
            return t.copy_(chosen) if in_place else chosen

        if not in_place:
            self.graphs = StepGraphs()
        for store in self.stores:
            store.map(select)
            store.lengths = [store.lengths[i] for i in order] if store.lengths else []
        self.positions = [self.positions[i] for i in order] if self.positions else []

    def __repr__(self) -> str:
        return f"FlowHNCache({self.length} tokens, {self.bytes():,} bytes)"
