"""Key and value caches that hold what a layer group shares once.

Mode ``qk``: the owner stores K and V, its consumers store V alone. Mode ``kv``: the owner stores K and V, its consumers store
nothing. The dynamic form grows (by half, so that appending is amortised); the static one is allocated once, keeps its
addresses and its length on the device, and can be captured in a CUDA graph.

A forward pass appends in every layer and calls :meth:`SharedCache.commit` once, at its end: positions and masks are taken
from the length before it grew, and a pass that raises leaves the cache as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from effcore.models.config import SharedLlamaConfig
from effcore.models.layout import Layout
from effcore.models.step_graph import StepGraph


class CacheStore:
    """Padded buffers [B, Hkv, capacity, D] of one layer; ``keys`` stays None where the group's owner holds them."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def buffers(self) -> list[Tensor]:
        return [t for t in (self.keys, self.values) if t is not None]

    def map(self, function: Any) -> None:
        self.keys = None if self.keys is None else function(self.keys)
        self.values = None if self.values is None else function(self.values)


class SharedCache(Cache):
    """The cache of a model whose layers share activations, for one layout and mode.

    Args:
        config: the model's configuration; its mode and layout decide what is stored.
        max_cache_len: tokens that a *static* cache holds; decoding steps behind it are replayed from a CUDA graph on a GPU.
            None: a dynamic cache.

    A cache belongs to the layout that it was made for: a model with another one refuses it.
    """

    def __init__(self, config: SharedLlamaConfig, layout: Layout | None = None, max_cache_len: int | None = None):
        self.layout = config.layout if layout is None else layout
        self.mode, self.owner = config.share_mode, config.share_owner
        self.max_cache_len = max_cache_len
        self.length = 0  # dynamic: tokens held
        self.device_length: Tensor | None = None  # static: the same, int64 [] on the device
        self.first_key: Tensor | None = None  # [B] first visible key of the last token (padding, documents)
        self._slots: Tensor | None = None  # static: where the pass writes its tokens, the same in every layer
        self.graph = StepGraph()
        count = self.layout.num_layers
        self._stores: list[CacheStore | None] = [
            None if self.mode == "kv" and self.layout.is_consumer(i) else CacheStore() for i in range(count)
        ]
        # owner="projection": the K,V that a group shares are no layer's own.
        self._projected = {o: CacheStore() for o in self.layout.groups} if self.owner == "projection" else {}
        self._held = [s for s in self._stores if s is not None] + list(self._projected.values())
        super().__init__(layers=self._held)  # type: ignore[arg-type]  # transformers' layers each hold K and V

    # ---------------------------------------------------------------- what a forward pass does

    @property
    def is_static(self) -> bool:
        return self.max_cache_len is not None

    def past(self, device: torch.device) -> int | Tensor:
        """Tokens held: an int, or a tensor on the device where the cache is static (a copy: the cache's own is updated)."""
        if not self.is_static:
            return self.length
        self._slots = None
        if self.device_length is None:
            self.device_length = torch.zeros((), dtype=torch.int64, device=device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.device_length)
        return self.device_length.clone()

    def append_kv(self, layer: int, keys: Tensor, values: Tensor, *, projected: bool = False) -> tuple[Tensor, Tensor]:
        """Writes the new tokens' K and V behind those held; returns all of them (static: the whole padded buffers).

        The first tokens come back as they were given, so that one pass over a prompt stays differentiable; what is stored
        is detached. ``projected`` means the extra K,V of ``owner="projection"``.
        """
        k, v = self._append(layer, keys, values, projected)
        assert k is not None
        return k, v

    def places(self, layer: int, tokens: int) -> tuple[Tensor | None, Tensor, Tensor] | None:
        """Where a pass of ``tokens`` tokens may write K and V itself: static buffers [B, Hkv, capacity, D] of both (None for
        a consumer's keys), and int64 [tokens] slots of their third dimension. None where there are no such buffers yet, or a
        gradient is wanted.
        """
        store = self._stores[layer]
        if not self.is_static or store is None or store.values is None or torch.is_grad_enabled():
            return None
        return store.keys, store.values, self._slots_of(tokens, store.values.device)

    def append_v(self, layer: int, values: Tensor) -> Tensor:
        """The same in a consumer of mode ``qk``, which has no K of its own."""
        return self._append(layer, None, values, False)[1]

    def _append(self, layer: int, keys: Tensor | None, values: Tensor, projected: bool) -> tuple[Tensor | None, Tensor]:
        store = self._projected[layer] if projected else self._stores[layer]
        if store is None:
            raise RuntimeError(
                f"effcore.SharedCache: layer {layer} stores nothing, it uses layer {self.layout.owner_of(layer)}'s"
            )
        if self.is_static:
            return self._write_static(store, keys, values)
        new = values.shape[2]
        store.keys = None if keys is None else self._grown(store.keys, keys)
        store.values = self._grown(store.values, values)
        if self.length == 0:
            return keys, values
        end = self.length + new
        return (None if store.keys is None else store.keys[:, :, :end]), store.values[:, :, :end]

    def commit(self, tokens: int, first_key: Tensor | None) -> None:
        """The pass is done: ``tokens`` more are held. ``first_key`` [B] or [B, S] is what its queries saw."""
        last = first_key if first_key is None or first_key.dim() == 1 else first_key[:, -1]
        if self.is_static:
            assert self.device_length is not None
            self.device_length.add_(tokens)
            self._slots = None
            if last is None:
                self.first_key = None
            elif self.first_key is None or self.first_key.shape != last.shape:
                self.first_key = last.clone()
            else:
                self.first_key.copy_(last)
        else:
            self.length += tokens
            self.first_key = last

    def _grown(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        new, held = new.detach(), self.length
        end = held + new.shape[2]
        if buffer is not None and held and buffer.shape[:2] != new.shape[:2]:
            raise ValueError(
                f"effcore.SharedCache: holds [batch, heads] = {tuple(buffer.shape[:2])}, got {tuple(new.shape[:2])}"
            )
        if not held and not torch.is_grad_enabled():
            return new  # the first tokens as they are: the next that come need a larger buffer anyway
        if buffer is None or not held or end > buffer.shape[2] or buffer.dtype != new.dtype:
            capacity = end if not held else max(end, held + held // 2 + 64)
            grown = new.new_empty((*new.shape[:2], capacity, new.shape[3]))
            if held and buffer is not None:
                grown[:, :, :held] = buffer[:, :, :held]
            buffer = grown
        buffer[:, :, held:end] = new
        return buffer

    def _write_static(self, store: CacheStore, keys: Tensor | None, values: Tensor) -> tuple[Tensor | None, Tensor]:
        assert self.max_cache_len is not None and self.device_length is not None
        if torch.is_grad_enabled() and (values.requires_grad or (keys is not None and keys.requires_grad)):
            raise RuntimeError(
                "effcore.SharedCache: a static cache is not differentiable; call the model under torch.no_grad()"
            )
        capacity, slots = self.max_cache_len, self._slots_of(values.shape[2], values.device)

        def write(buffer: Tensor | None, new: Tensor) -> Tensor:
            if buffer is None:
                buffer = new.new_zeros((*new.shape[:2], capacity, new.shape[3]))
                if not torch.compiler.is_compiling():
                    torch._dynamo.mark_static_address(buffer)
            return buffer.index_copy_(2, slots, new)

        store.keys = None if keys is None else write(store.keys, keys)
        store.values = write(store.values, values)
        return store.keys, store.values

    def _slots_of(self, tokens: int, device: torch.device) -> Tensor:
        """Where the pass writes its tokens."""
        assert self.max_cache_len is not None and self.device_length is not None
        capacity, on_host = self.max_cache_len, device.type == "cpu" and not torch.compiler.is_compiling()
        if tokens > capacity or (on_host and int(self.device_length) + tokens > capacity):
            raise ValueError(
                f"effcore.SharedCache: the static cache holds {capacity} tokens, and {tokens} more do not fit"
            )
        if self._slots is None or self._slots.shape[0] != tokens:
            self._slots = torch.arange(tokens, device=device) + self.device_length
        return self._slots

    # ---------------------------------------------------------------- transformers' Cache interface

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("effcore.SharedCache works with effcore's models only: a layer's K may be another layer's")

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        if not self.is_static:
            return self.length
        return 0 if self.device_length is None else self.device_length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_cache_len if self.max_cache_len is not None else -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return (self.max_cache_len if self.max_cache_len is not None else self.length + query_length), 0

    @property
    def is_compileable(self) -> bool:
        return self.is_static

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_initialized(self) -> bool:
        return any(s.values is not None for s in self._held)

    @property
    def batch_size(self) -> int:
        values = self._held[0].values
        return -1 if values is None else values.shape[0]

    def reset(self) -> None:
        """Forgets all tokens; static buffers keep their addresses."""
        self.length, self.first_key = 0, None
        if self.device_length is not None:
            self.device_length.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens (transformers counts them negatively)."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"effcore.SharedCache.crop: takes minus the number of tokens to remove, got {tokens_to_remove}"
            )
        if self.is_static:
            if self.device_length is not None:
                self.device_length.add_(tokens_to_remove).clamp_(min=0)
        else:
            self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was (beam search)."""
        self._select(beam_idx, in_place=self.is_static)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices, in_place=False)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats)
        self._select(rows, in_place=False)

    def _select(self, rows: Tensor, *, in_place: bool) -> None:
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()

        def select(t: Tensor) -> Tensor:
            chosen = t.index_select(0, rows.to(t.device))
            return t.copy_(chosen) if in_place else chosen

        for store in self._held:
            store.map(select)
        if self.first_key is not None:
            self.first_key = select(self.first_key)

    # ---------------------------------------------------------------- size

    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes in this cache; 0 before the first pass."""
        return sum(t.shape[1] * t.shape[3] * t.element_size() for s in self._held for t in s.buffers())

    def __repr__(self) -> str:
        form = f"static, {self.max_cache_len} tokens" if self.is_static else f"{self.length} tokens"
        return f"SharedCache({self.mode}, {self.layout}, {form})"


def cache_bytes_per_token(
    config: SharedLlamaConfig, layout: Layout | None = None, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Bytes a token that a cache of this model takes, from its configuration alone."""
    layout = config.layout if layout is None else layout
    if config.share_mode == "qk":
        tensors = 2 * layout.num_layers - layout.shared
    else:
        tensors = 2 * (layout.num_layers - layout.shared)
        if config.share_owner == "projection":
            tensors += 2 * len(layout.groups)
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    return tensors * (config.num_key_value_heads or config.num_attention_heads) * head_dim * dtype.itemsize
