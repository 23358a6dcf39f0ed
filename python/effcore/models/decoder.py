"""The decoder of the LLaMA family, with layers that share attention activations by a layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple

from effcore.models import visibility
from effcore.models.cache import SharedCache
from effcore.models.config import SharedLlamaConfig
from effcore.models.layer import (
    PIECES,
    KVProjection,
    Pieces,
    SharedDecoderLayer,
    Visibility,
    unused_projections,
    wants_gradients,
)
from effcore.models.layout import Layout
from effcore.ops import attention as ops


class SharedLlamaPreTrainedModel(PreTrainedModel):
    """What transformers asks of a family: its configuration, what may not be split, and which checkpointing it takes."""

    config: SharedLlamaConfig
    config_class = SharedLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SharedDecoderLayer"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_compile_fullgraph = True

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] | None = None,
        every_n_layers: int = 1,
    ) -> None:
        keywords = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and keywords.get("use_reentrant", True):
            raise ValueError(
                "effcore: gradient checkpointing with use_reentrant=True loses the gradients that layers send through shared "
                "activations; use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        function = {"gradient_checkpointing_func": gradient_checkpointing_func} if gradient_checkpointing_func else {}
        super()._set_gradient_checkpointing(enable=enable, every_n_layers=every_n_layers, **function)


class SharedLlamaModel(SharedLlamaPreTrainedModel):
    """The decoder: embeddings, layers that share by ``config.share_layout``, final norm."""

    def __init__(self, config: SharedLlamaConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([SharedDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        # Not inside a layer: FSDP2 gathers a layer's parameters again when the gradient of its *output* arrives, and the
        # gradient of these projections comes before that.
        self.kv_projections = nn.ModuleDict()
        if config.share_owner == "projection":
            self.add_kv_projections(config.layout)
        self.set_layout(config.layout)
        self.post_init()

    # ---------------------------------------------------------------- the layout

    @property
    def layout(self) -> Layout:
        return self._layout

    def set_layout(self, layout: Layout | str | int | Sequence[int]) -> None:
        """See :meth:`SharedLlamaForCausalLM.set_layout`."""
        layout = Layout.coerce(layout, self.config.num_hidden_layers)
        self.config.check_layout(layout)
        if self.config.share_owner == "projection":
            missing = [owner for owner in layout.groups if str(owner) not in self.kv_projections]
            if missing:
                raise ValueError(
                    f"effcore: layout {layout} shares the projected keys and values of layers {missing}, which have no "
                    "projection; make them with model.add_kv_projections(layout) before the optimizer is built"
                )
        self._layout = layout
        self._consumer_counts = tuple(len(layout.consumers_of(i)) for i in range(layout.num_layers))
        self.config.share_layout = str(layout)
        for _, parameter in self.switched_off_parameters():
            parameter.grad = None

    def add_kv_projections(self, layout: Layout | str | int) -> None:
        """Makes the projections that ``layout`` needs (``share_owner="projection"``), as copies of the first consumers'."""
        layout = Layout.coerce(layout, self.config.num_hidden_layers)
        for owner, consumers in layout.groups.items():
            if str(owner) not in self.kv_projections:
                first: Any = self.layers[consumers[0]]
                weight = first.input_layernorm.weight
                projection = KVProjection(self.config).to(device=weight.device, dtype=weight.dtype)
                if weight.device.type != "meta":
                    projection.copy_from(first)
                self.kv_projections[str(owner)] = projection

    def switched_off_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """See :meth:`SharedLlamaForCausalLM.switched_off_parameters`."""
        found: list[tuple[str, nn.Parameter]] = []
        for i in self.layout.consumers:
            for name in unused_projections(self.config.share_mode):
                module = getattr(self.layers[i].self_attn, name)
                if module is not None:
                    prefix = f"layers.{i}.self_attn.{name}."
                    found += [(prefix + n, p) for n, p in module.named_parameters()]
        used = {str(owner) for owner in self.layout.groups}
        for owner, projection in self.kv_projections.items():
            if owner not in used:
                found += [(f"kv_projections.{owner}.{n}", p) for n, p in projection.named_parameters()]
        return found

    def drop_unused_projections(self) -> None:
        """See :meth:`SharedLlamaForCausalLM.drop_unused_projections`."""
        names = unused_projections(self.config.share_mode)
        for i in self.layout.consumers:
            layer: Any = self.layers[i]
            layer.self_attn.drop(names)
        for owner in list(self.kv_projections):
            if int(owner) not in self.layout.groups:
                del self.kv_projections[owner]
        self.config.dropped_projections = sorted({*(self.config.dropped_projections or []), *self.layout.consumers})

    def compile_pieces(self, **options: Any) -> None:
        """See :meth:`SharedLlamaForCausalLM.compile_pieces`."""
        options.setdefault("fullgraph", True)
        if options.get("mode") in ("reduce-overhead", "max-autotune") or "triton.cudagraphs" in options.get(
            "options", ()
        ):
            raise ValueError(
                "effcore: pieces cannot be CUDA graphs of their own, whose outputs the next call overwrites while caches keep "
                "them: take mode='max-autotune-no-cudagraphs'; behind a static cache whole steps are CUDA graphs"
            )
        compiled = Pieces(**{name: torch.compile(piece, **options) for name, piece in PIECES._asdict().items()})
        for layer in self.layers:
            layer.pieces = compiled  # type: ignore[assignment]

    # ---------------------------------------------------------------- forward

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SharedCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        last: int | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, S, C] after the final norm.

        Args:
            attention_mask: [B, cached + S] of ones and zeros, padding on the left or right. Nothing else is accepted.
            position_ids: [1 or B, S]; a position that does not follow its predecessor's begins a new document.
            document_ids, cu_seqlens: packed documents by name; no token attends to another document.
            last: only the last tokens are asked for: where one owner's K,V serve all layers above it, only these pass
                through them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("effcore: give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        batch, tokens = hidden.shape[:2]
        past = 0 if cache is None else cache.past(hidden.device)
        differentiable = wants_gradients(self, hidden)
        if differentiable and isinstance(past, int) and past:
            raise RuntimeError(
                "effcore: continuing from a cache is not differentiable; call the model under torch.no_grad(), or on the whole "
                "sequence with use_cache=False"
            )
        position_ids, first_key = visibility.resolve(
            batch,
            tokens,
            past,
            device=hidden.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            cu_seqlens=cu_seqlens,
            carry=None if cache is None else cache.first_key,
            capacity=None if cache is None else cache.max_cache_len,
        )
        cos, sin = self.rotary_emb(hidden, position_ids=position_ids)

        if last is not None and (
            output_hidden_states or self.layout.top_owner is None or last >= tokens or self.config.share_mode != "kv"
        ):
            last = None
        top_owner = None if last is None else self.layout.top_owner
        seen = self._visible(hidden, tokens, past, first_key, decode=tokens == 1 and not differentiable)
        seen_last = seen
        if last is not None:
            seen_last = self._visible(
                hidden, tokens, past, first_key, decode=last == 1 and not differentiable, last=last
            )

        mode, projected = self.config.share_mode, self.config.share_owner == "projection"
        keep = "lse" if self.gradient_checkpointing and self.training else "auto"
        given: dict[int, Any] = {}  # owner -> what its consumers get; for SharedScores one each
        states = [hidden]
        for i, layer in enumerate(self.layers):
            owner = self._layout.owners[i]
            counts = 0 if projected else self._consumer_counts[i]
            shared = None
            if owner != i:
                shared = given[owner]
                if mode == "qk":
                    shared, given[owner] = shared[0], shared[1:]
            cut = last if i == top_owner and not projected else None
            visible = (seen_last if cut is not None or (top_owner is not None and i > top_owner) else seen)[
                self.config.window(i)
            ]
            hidden, produced = layer(hidden, cos, sin, visible, cache, shared, mode, counts, keep, cut)
            if projected and self._consumer_counts[i]:
                k, v = self.kv_projections[str(i)](hidden, cos, sin)
                if cache is not None:
                    k, v = cache.append_kv(i, k, v, projected=True)
                produced = ops.share_kv(k, v)
            if produced is not None:
                given[i] = produced
            if i == top_owner:
                assert last is not None
                hidden, cos, sin = hidden[:, -last:], cos[:, -last:], sin[:, -last:]
            states.append(hidden)
        if cache is not None:
            cache.commit(tokens, first_key)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*states[:-1], hidden) if output_hidden_states else None,
        )

    def _cache(self, cache: Any, use_cache: bool | None) -> SharedCache | None:
        if self.gradient_checkpointing and self.training:
            if cache is not None:
                raise ValueError("effcore: past_key_values cannot be used while training with gradient checkpointing")
            return None
        if cache is None:
            # Not by default while training: nobody reads it there, and it takes memory.
            wanted = (self.config.use_cache and not self.training) if use_cache is None else use_cache
            return SharedCache(self.config, self.layout) if wanted else None
        if not isinstance(cache, SharedCache):
            raise TypeError(
                f"effcore: past_key_values must be an effcore.models.SharedCache, got {type(cache).__name__}: "
                "a cache of this model holds what a group of layers shares once"
            )
        if (
            cache.layout != self.layout
            or cache.mode != self.config.share_mode
            or cache.owner != self.config.share_owner
        ):
            raise ValueError(
                f"effcore: the cache was made for mode {cache.mode!r}, layout {cache.layout}, but the model has "
                f"{self.config.share_mode!r}, {self.layout}; start with a new cache"
            )
        return cache

    def _visible(
        self,
        hidden: Tensor,
        tokens: int,
        past: int | Tensor,
        first_key: Tensor | None,
        *,
        decode: bool,
        last: int | None = None,
    ) -> dict[int | None, Visibility]:
        """What the queries see, by sliding window (None: layers without one)."""
        batch, device = hidden.shape[0], hidden.device
        lengths = None
        if isinstance(past, Tensor):
            lengths = (past + tokens).to(torch.int32).expand(batch).contiguous()
        elif decode:
            lengths = torch.full((batch,), past + tokens, dtype=torch.int32, device=device)
        result = {}
        for window in {self.config.window(i) for i in range(self.config.num_hidden_layers)}:
            first = first_key
            if window is not None:
                first = visibility.with_window(first_key, window, batch, tokens, past, device)
            if last is not None:
                first = visibility.last_queries(first, last)
            if decode and first is not None and first.dim() == 2:
                first = first[:, -1].contiguous()
            result[window] = Visibility(lengths, first, decode)
        return result
