"""Decoding steps of models with shared activations from a CUDA graph.

Behind a static cache a step has the same shapes and addresses every time, and what moves from step to step, the length, lies on
the device. So the first step is recorded, and the host does one launch for each of the next instead of some hundreds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from effcore.models.cache import SharedCache


def is_recordable_step(ids: Tensor | None, cache: Any, model: Any) -> TypeGuard[Tensor]:
    """Whether these ids are one token a row behind a static cache, on one GPU, and nothing is on that a recorded step would not
    see: gradients, autocast, a compiler, another capture."""
    if ids is None or not ids.is_cuda or ids.dim() != 2 or ids.shape[1] != 1 or not getattr(cache, "is_static", False):
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cuda") or torch.compiler.is_compiling():
        return False
    devices = getattr(model, "hf_device_map", None) or {}
    if (model.model.gradient_checkpointing and model.training) or len(set(devices.values())) > 1:
        return False
    return not torch.cuda.is_current_stream_capturing()


def can_replay(cache: Any, ids: Tensor | None, mask: Tensor | None, model: Any) -> TypeGuard[SharedCache]:
    """Whether this is one step behind a static cache that holds a prompt. What the model would refuse is left for it to
    refuse."""
    if not is_recordable_step(ids, cache, model):
        return False
    if mask is not None and tuple(mask.shape) != (ids.shape[0], cache.max_cache_len):  # it would grow from step to step
        return False
    rope = str(model.model.rotary_emb.rope_type)
    if "dynamic" in rope or rope == "longrope":  # these look at the positions on the host
        return False
    return cache.batch_size == ids.shape[0] and cache.layout == model.layout


def record(run: Callable[[], Any], stream: torch.cuda.Stream, pool: Any = None) -> torch.cuda.CUDAGraph:
    """What ``run`` does on the device of this stream, as a graph; nothing runs. The stream is the caller's, since torch's own
    for captures belongs to whichever device came first.

    Raises:
        RuntimeError: something in ``run`` cannot be recorded.
    """
    current = torch.cuda.current_stream(stream.device)
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(current)
    with torch.cuda.stream(stream), torch.no_grad():
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    current.wait_stream(stream)
    return graph


class StepGraph:
    """The recorded step of one model behind one cache, and the tensors that it reads and writes.

    It is recorded anew where those have moved: weights (``model.to``, ``p.data = ...``), the cache's buffers, another layout or
    other inputs. What else changes between steps is not noticed: weights that other parameters replaced, adapters that were
    switched, hooks. Take a new cache then, as each ``generate()`` does. A step that cannot be recorded (a hook that looks at
    a value on the host) is done as it is, and so are all after it.
    """

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._logits: Tensor | None = None
        self._model: Any = None
        self._weights: list[Tensor] = []
        self._recorded: Any = None
        self._unrecordable: Any = None  # the model whose step could not be recorded

    def __deepcopy__(self, memo: Any) -> StepGraph:
        return StepGraph()  # a copy of the cache has buffers of its own

    def step(self, model: Any, cache: SharedCache, inputs: dict[str, Tensor]) -> Tensor:
        """Logits [B, 1, V] of the next token of each row; the cache goes on by it."""
        if self._graph is None or self._model is not model or self._recorded != self._state(cache, inputs):
            self._graph = None
            logits = self._run(model, cache, inputs)  # as it is, which also sets up what a capture may not
            if self._unrecordable is not model:
                self._record(model, cache, inputs, logits)
            return logits
        assert self._logits is not None
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        self._graph.replay()
        return self._logits.clone()

    def _run(self, model: Any, cache: SharedCache, inputs: dict[str, Tensor]) -> Tensor:
        return model.lm_head(model.model(past_key_values=cache, use_cache=True, **inputs).last_hidden_state)

    def _state(self, cache: SharedCache, inputs: dict[str, Tensor]) -> Any:
        """What a recorded step takes for granted."""
        held = [cache.device_length, cache.first_key, *(t for store in cache._held for t in store.buffers())]
        places = [None if t is None else t.data_ptr() for t in [*self._weights, *held]]
        return places, {name: (t.shape, t.dtype) for name, t in inputs.items()}, str(cache.layout)

    def _record(self, model: Any, cache: SharedCache, inputs: dict[str, Tensor], logits: Tensor) -> None:
        """Records the step that was just done; nothing runs."""
        self._model, self._weights = model, [*model.parameters(), *model.buffers()]
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._logits = out = logits.clone()
        first_key = cache.first_key
        try:
            self._graph = record(
                lambda: out.copy_(self._run(model, cache, self._inputs)), torch.cuda.Stream(logits.device)
            )
        except RuntimeError as error:
            warnings.warn(f"effcore: a decoding step cannot be recorded, and is done as it is: {error}", stacklevel=4)
            self._unrecordable = model
            cache.first_key = first_key
        self._recorded = self._state(cache, inputs)
