"""FlowHN language models: parallel attention and SSM, with tokens routed by position.

A forward pass over a text equals prefill and steps over its parts: a token's branch depends on its position in its row and the
block, attention caches hold the tokens that were routed to it, and the SSM's state moves on its own tokens only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from effcore.models.flowhn_block import FlowHNBlock, StateSpace
from effcore.models.flowhn_cache import FlowHNCache
from effcore.models.flowhn_config import FlowHNConfig
from effcore.models.flowhn_routes import Router
from effcore.models.flowhn_steps import can_replay
from effcore.models.layer import wants_gradients

_LOSS_ARGUMENTS = frozenset({"num_items_in_batch", "ignore_index", "shift_labels"})


class FlowHNPreTrainedModel(PreTrainedModel):
    """What transformers asks of a family: its configuration, what may not be split, and how weights begin."""

    config: FlowHNConfig
    config_class = FlowHNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FlowHNBlock"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StateSpace):
            module.reset_parameters()


class FlowHNModel(FlowHNPreTrainedModel):
    """The decoder: embeddings, blocks, final norm."""

    def __init__(self, config: FlowHNConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([FlowHNBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.router = Router(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: FlowHNCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, L, C] of the new tokens; zeros at padding.

        Args:
            attention_mask: [B, past + L] ones, and zeros for padding on the left or on the right.
            past_key_values: goes on from there.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds; a mask of another shape or with a hole; a cache of
                other rows or blocks.
            RuntimeError: gradients behind a static cache, or one that holds tokens already.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("effcore: give input_ids or inputs_embeds, not both and not neither")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, tokens, _ = hidden.shape
        cache = self._cache(past_key_values, use_cache)
        past = 0 if cache is None else cache.length
        starts = cache.positions if cache is not None and cache.positions else [0] * batch
        if len(starts) != batch:
            raise ValueError(f"effcore: the cache holds {len(starts)} rows, got {batch}")
        valid = _valid_tokens(attention_mask, batch, tokens, past, begun=all(starts))
        counts = [tokens] * batch if valid is None else valid.sum(1).tolist()
        ends = [s + n for s, n in zip(starts, counts, strict=True)]
        if cache is not None:
            cache.check_room(ends)
            if (cache.is_static or past) and wants_gradients(self, hidden):
                what = "a static cache" if cache.is_static else "continuing from a cache"
                raise RuntimeError(
                    f"effcore: {what} is not differentiable; call the model under torch.no_grad(), or on the whole "
                    "sequence with use_cache=False"
                )
        uniform = valid is None and len(set(starts)) <= 1
        if uniform:
            routes = self.router.uniform(batch, starts[0] if starts else 0, tokens, hidden.device)
            places = None
        else:
            flat = torch.ones(batch * tokens, dtype=torch.bool) if valid is None else valid.flatten()
            places = flat.nonzero().flatten().to(hidden.device)
            hidden = hidden.flatten(0, 1)[places][None]
            routes = self.router.packed(starts, counts, hidden.device)
        states = [hidden]
        stores = [None] * len(self.layers) if cache is None else cache.stores
        if hidden.numel():
            for block, route, store in zip(self.layers, routes, stores, strict=True):
                hidden = block(hidden, route, store)
                states.append(hidden)
        if cache is not None:
            cache.commit(tokens, ends)
        hidden = self.norm(hidden)
        if places is not None:  # back to rows
            unpack = [hidden, *states] if output_hidden_states else [hidden]
            unpack = [t.new_zeros(batch * tokens, t.shape[2]).index_copy(0, places, t[0]) for t in unpack]
            hidden, *states = (t.view(batch, tokens, -1) for t in unpack)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*states[:-1], hidden) if output_hidden_states else None,
        )

    def _cache(self, cache: Any, use_cache: bool | None) -> FlowHNCache | None:
        if self.gradient_checkpointing and self.training:
            if cache is not None:
                raise ValueError("effcore: past_key_values cannot be used while training with gradient checkpointing")
            return None
        if cache is None:
            wanted = (self.config.use_cache and not self.training) if use_cache is None else use_cache
            return FlowHNCache(self.config) if wanted else None
        if not isinstance(cache, FlowHNCache):
            raise TypeError(
                f"effcore: past_key_values must be an effcore.models.FlowHNCache, got {type(cache).__name__}"
            )
        if len(cache.stores) != len(self.layers):
            raise ValueError(f"effcore: the cache is for {len(cache.stores)} blocks, the model has {len(self.layers)}")
        return cache


def _valid_tokens(mask: Tensor | None, batch: int, tokens: int, past: int, *, begun: bool) -> Tensor | None:
    """bool [B, L] on the host: which new tokens are none of padding; None: all. One synchronisation a prefill on a GPU.

    ``begun`` says that each row has had a token: padding on the left is behind it.
    """
    if mask is None:
        return None
    if mask.dim() != 2 or tuple(mask.shape) != (batch, past + tokens):
        raise ValueError(
            f"effcore: attention_mask must be [{batch}, {past + tokens}] (cached and new tokens), got {tuple(mask.shape)}"
        )
    if past and tokens == 1 and begun:  # a decoded token is never padding
        return None
    seen = (mask != 0).cpu()
    rises = (seen[:, 1:] & ~seen[:, :-1]).sum(1) + seen[:, 0]
    if bool((rises > 1).any()):
        raise ValueError(
            "effcore: attention_mask has a hole: padding may stand on the left or on the right of a row, not between "
            "tokens (a prompt padded on the right cannot be continued: pad it on the left)"
        )
    new = seen[:, past:]
    return None if bool(new.all()) else new


class FlowHNForCausalLM(FlowHNPreTrainedModel, GenerationMixin):
    """A FlowHN causal language model, made by ``FlowHNForCausalLM(FlowHNConfig.of_size("350M"))`` or ``from_pretrained``.

    As transformers' own: ``model(input_ids [B, L], attention_mask [B, L], labels [B, L])`` gives ``loss`` and ``logits``
    [B, L, V]; ``generate`` samples.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: FlowHNConfig):
        super().__init__(config)
        self.model = FlowHNModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: FlowHNCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, L, V], or of ``logits_to_keep`` tokens alone; and the loss where ``labels`` are given.

        Raises:
            TypeError: an argument that this model does not know.
        """
        unknown = {name for name, value in kwargs.items() if value is not None and value is not False} - _LOSS_ARGUMENTS
        if unknown:
            raise TypeError(f"effcore: FlowHNForCausalLM.forward got unexpected arguments {sorted(unknown)}")
        if (
            labels is None
            and not output_hidden_states
            and input_ids is not None
            and inputs_embeds is None
            and can_replay(past_key_values, input_ids, attention_mask, self)
        ):
            logits = past_key_values.graphs.step(self, input_ids, past_key_values)
            return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        outputs = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, output_hidden_states)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        given = model_kwargs.get("past_key_values")
        if given is not None and not isinstance(given, FlowHNCache):
            raise TypeError(
                f"effcore: past_key_values must be an effcore.models.FlowHNCache, got {type(given).__name__}"
            )
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ValueError(f"effcore: cache_implementation must be 'dynamic' or 'static', got {kind!r}")
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = FlowHNCache(self.config, max_cache_length if kind == "static" else None)

    def create_masks_for_generate(self, *, attention_mask: Tensor | None = None, **_: Any) -> Any:
        """2D masks stay 2D."""
        return attention_mask
