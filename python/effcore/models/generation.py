"""How ``generate()`` makes caches and masks for a model that shares activations."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers.generation import GenerationMixin

from effcore.models.cache import SharedCache


class SharedGenerationMixin(GenerationMixin):
    """transformers' generation (greedy, sampling, beams, assisted, chunked prefill) on :class:`SharedCache`."""

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        given = model_kwargs.get("past_key_values")
        implementation = generation_config.cache_implementation
        if given is not None:
            if not isinstance(given, SharedCache):
                raise TypeError(
                    f"effcore: past_key_values must be an effcore.models.SharedCache, got {type(given).__name__}"
                )
            if implementation is not None:
                raise ValueError("effcore: give past_key_values or cache_implementation, not both")
            return
        if generation_config.use_cache is False:
            return
        if implementation not in (None, "dynamic", "static"):
            raise ValueError(f"effcore: cache_implementation must be 'dynamic' or 'static', got {implementation!r}")
        model: Any = self
        length = None
        if implementation == "static":
            # As in transformers: never smaller than before, so that a step that somebody compiles is kept.
            length = max(max_cache_length, generation_config.max_cache_len or 0, getattr(model, "_static_cache_len", 0))
            model._static_cache_len = length
            if generation_config.compile_config is None:
                generation_config.disable_compile = True  # on a GPU steps come from a CUDA graph as they are
        model_kwargs["past_key_values"] = SharedCache(model.config, model.layout, length)

    def create_masks_for_generate(
        self, *, attention_mask: Tensor | None = None, past_key_values: Any = None, **_: Any
    ) -> Any:
        """2D masks stay 2D. For a static cache they get its length, so that a step's shapes are the same at every step."""
        if (
            attention_mask is None
            or not isinstance(past_key_values, SharedCache)
            or past_key_values.max_cache_len is None
        ):
            return attention_mask
        return pad(attention_mask, (0, past_key_values.max_cache_len - attention_mask.shape[1]), value=1)
