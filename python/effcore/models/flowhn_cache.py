"""The cache of FlowHN models: for each block the keys and values of the tokens that its attention took, and the SSM's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from effcore.models.flowhn_config import FlowHNConfig
from effcore.models.flowhn_routes import Part


class BlockStore:
    """What one block remembers. Keys and values lie in padded buffers [B, Hkv, capacity, D], each row with its own length."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.lengths: list[int] = []
        self.convolution: Tensor | None = None  # [B, width - 1, E]
        self.state: Tensor | None = None  # [B, E, N]

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

    @staticmethod
    def slots(first: list[int], part: Part) -> Tensor:
        """int64 [K]: the place of each packed token in its row, counted from ``first`` of the row."""
        assert part.rows is not None
        parts = [torch.arange(f, f + n) for f, n in zip(first, part.counts, strict=True)]
        return torch.cat(parts).to(part.rows.device)

    @staticmethod
    def _grown(buffer: Tensor | None, new: Tensor, batch: int, held: int, end: int) -> Tensor:
        if buffer is not None and end <= buffer.shape[2]:
            return buffer
        capacity = end if buffer is None else max(end, held + held // 2 + 64)
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

    Attributes:
        length: columns of tokens seen, padding included (what ``attention_mask`` spans).
        positions: tokens of each row seen, padding left out: the position of its next one.
    """

    def __init__(self, config: FlowHNConfig):
        self.stores = [BlockStore() for _ in range(config.num_hidden_layers)]
        self.length = 0
        self.positions: list[int] = []
        super().__init__(layers=self.stores)  # type: ignore[arg-type]

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
        return -1

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
        raise NotImplementedError("effcore.FlowHNCache.crop: a recurrent state cannot forget its last tokens")

    def reset(self) -> None:
        for i in range(len(self.stores)):
            self.stores[i].__init__()  # type: ignore[misc]
        self.length, self.positions = 0, []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was (beam search)."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(len(self.positions)).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        alike = len(set(self.positions)) <= 1  # then no row needs to be read on the host
        order = [0] * rows.shape[0] if alike else rows.tolist()
        for store in self.stores:
            store.map(lambda t: t.index_select(0, rows.to(t.device)))
            store.lengths = [store.lengths[i] for i in order] if store.lengths else []
        self.positions = [self.positions[i] for i in order] if self.positions else []

    def __repr__(self) -> str:
        return f"FlowHNCache({self.length} tokens, {self.bytes():,} bytes)"
