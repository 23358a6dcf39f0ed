"""Decoding steps of FlowHN models from CUDA graphs.

Which branch a token takes in each block is known from its position, and a model has few such paths (FAC: at most one more than
it has blocks). So each path is captured once, at the first step that takes it, over the buffers of a static cache; what moves
from step to step, the lengths, lies on the device. The host then does one launch a step instead of some hundreds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from effcore.models.step_graph import is_recordable_step, record

if TYPE_CHECKING:
    from effcore.models.flowhn_cache import FlowHNCache


def can_replay(cache: Any, ids: Tensor | None, mask: Tensor | None, model: Any) -> TypeGuard[FlowHNCache]:
    """Whether this is one step of equal rows behind a static cache. What the model would refuse (a mask of another shape, a
    cache beside gradient checkpointing) is left for it to refuse.
    """
    if not is_recordable_step(ids, cache, model):
        return False
    if mask is not None and tuple(mask.shape) != (ids.shape[0], cache.length + 1):
        return False
    alike = len(cache.positions) == ids.shape[0] and len(set(cache.positions)) == 1
    return alike and 0 < cache.positions[0] < cache.max_cache_len  # at 0 it may be padding


class StepGraphs:
    """The captured steps of one model behind one cache, and the buffers that they read and write.

    Captured steps read the weights where they were. Weights that move (``model.to``, ``p.data = ...``) are noticed, and the
    steps captured anew. Hooks on submodules, and weights that were replaced by other parameters, are not: take a new cache.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[bool, ...], torch.cuda.CUDAGraph] = {}
        self._ids: Tensor | None = None
        self._logits: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None  # one for all, so that they share what a step needs in between
        self._model: Any = None
        self._weights: list[Tensor] = []
        self._places: list[int] = []

    def __deepcopy__(self, memo: Any) -> StepGraphs:
        return StepGraphs()  # a copy of the cache has buffers of its own, and the model is no part of it

    def step(self, model: Any, ids: Tensor, cache: FlowHNCache) -> Tensor:
        """Logits [B, 1, V] of the next token of each row; the cache goes on by it."""
        position = cache.positions[0]
        path = model.model.router.path(position)
        self._check_weights(model)
        graph = self._graphs.get(path)
        if graph is None:
            # This step runs as it is, which also sets up what a capture may not; the next ones come from a graph.
            with torch.no_grad():
                hidden = model.model(ids, None, cache, use_cache=True).last_hidden_state
                logits = model.lm_head(hidden)
            self._graphs[path] = self._capture(model, ids, logits, cache)
            return logits
        assert self._ids is not None and self._logits is not None
        for store in cache.stores:
            store.counts(ids.device)
        self._ids.copy_(ids)
        graph.replay()
        for store, attends in zip(cache.stores, path, strict=True):
            if attends:
                store.advance()
        cache.commit(1, [position + 1] * ids.shape[0])
        return self._logits.clone()

    def _check_weights(self, model: Any) -> None:
        """Forgets steps that were captured of another model, or whose weights lie elsewhere now."""
        if self._model is model and self._places == [w.data_ptr() for w in self._weights]:
            return
        self._graphs, self._ids, self._logits, self._model = {}, None, None, model
        self._weights = [*model.parameters(), *model.buffers()]
        self._places = [w.data_ptr() for w in self._weights]

    def _capture(self, model: Any, ids: Tensor, logits: Tensor, cache: FlowHNCache) -> torch.cuda.CUDAGraph:
        """Records the step that was just done. Nothing runs, and the host's counts are put back."""
        if self._ids is None or self._logits is None:
            self._ids, self._logits = ids.clone(), logits.clone()
        held = [(store, store.lengths, store._counted) for store in cache.stores]
        length, positions = cache.length, cache.positions
        cache.positions = [positions[0] - 1] * len(positions)
        if self._stream is None:
            self._stream = torch.cuda.Stream(ids.device)
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        inputs, out = self._ids, self._logits

        def step() -> None:
            out.copy_(model.lm_head(model.model(inputs, None, cache, use_cache=True).last_hidden_state))

        try:
            return record(step, self._stream, pool)
        finally:
            for store, lengths, counted in held:
                store.lengths, store._counted = lengths, counted
            cache.length, cache.positions = length, positions
