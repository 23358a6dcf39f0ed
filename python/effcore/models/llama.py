"""LLaMA-family causal language models whose layers share attention activations by a layout.

One class covers Llama, Mistral, Qwen2, Qwen3 and what is built like them (SmolLM, TinyLlama, Yi, ...). Parameters have the
names that transformers gives them, so its checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from effcore.models.cache import SharedCache
from effcore.models.config import SharedLlamaConfig
from effcore.models.decoder import SharedLlamaModel, SharedLlamaPreTrainedModel
from effcore.models.generation import SharedGenerationMixin
from effcore.models.layout import Layout
from effcore.models.step_graph import can_replay

# What transformers and its Trainer pass along that concerns the loss.
_LOSS_ARGUMENTS = frozenset({"num_items_in_batch", "ignore_index", "shift_labels"})
# What they pass along that means nothing here: the lengths of flash-attn's varlen calls beside cu_seqlens.
_IGNORED_ARGUMENTS = frozenset({"cu_seq_lens_k", "max_length_q", "max_length_k", "cache_position", "output_attentions"})


class SharedLlamaForCausalLM(SharedLlamaPreTrainedModel, SharedGenerationMixin):
    """A causal language model of the LLaMA family with shared attention activations.

    Built from a :class:`SharedLlamaConfig`, loaded with :meth:`from_pretrained` (its own checkpoints, or those of Llama,
    Mistral, Qwen2 and Qwen3), or made of a loaded model by :func:`effcore.share_activations`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SharedLlamaConfig):
        super().__init__(config)
        self.model = SharedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # ---------------------------------------------------------------- the layout

    @property
    def layout(self) -> Layout:
        """The layout in force."""
        return self.model.layout

    def set_layout(self, layout: Layout | str | int | Sequence[int]) -> None:
        """Shares by ``layout`` (or from layer ``start`` on, given an int) from the next forward pass.

        No parameter is made or removed, and compiled pieces stay compiled. Gradients of parameters that this switches off
        are set to None.

        Raises:
            ValueError: a layout that does not fit the model, or that needs projections which were dropped.
        """
        self.model.set_layout(layout)

    @contextmanager
    def using_layout(self, layout: Layout | str | int) -> Iterator[None]:
        """``with model.using_layout(12): model.generate(...)``: another region length for some calls. Gradients that were
        gathered before are there afterwards."""
        before, gathered = self.layout, [(p, p.grad) for p in self.parameters() if p.grad is not None]
        self.set_layout(layout)
        switched_off = [(p, grad) for p, grad in gathered if p.grad is None]
        try:
            yield
        finally:
            self.set_layout(before)
            for parameter, grad in switched_off:
                parameter.grad = grad

    def switched_off_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that the layout in force does not use: Wq and Wk (``qk``) or Wk and Wv (``kv``) of consumers.

        They get no gradient (it stays None), so optimizers skip them: no weight decay, no momentum. What an optimizer
        gathered before they were switched off is the caller's to clear.
        """
        return [(f"model.{name}", parameter) for name, parameter in self.model.switched_off_parameters()]

    def add_kv_projections(self, layout: Layout | str | int) -> None:
        """``share_owner="projection"``: makes the projections that ``layout`` needs, before the optimizer is built."""
        self.model.add_kv_projections(layout)

    def drop_unused_projections(self) -> None:
        """Removes the consumers' unused projections from the model and its checkpoints; layouts that need them are refused."""
        self.model.drop_unused_projections()

    def compile_pieces(self, **options: Any) -> SharedLlamaForCausalLM:
        """Compiles what lies around attention, and the loss; one set of graphs serves every layer and every layout.

        Returns the model.

        Args:
            options: for :func:`torch.compile`; ``fullgraph=True`` unless given.

        Raises:
            ValueError: a mode that makes each piece a CUDA graph.
        """
        self.model.compile_pieces(**options)
        self.loss_function = torch.compile(self.loss_function, **options)
        return self

    # ---------------------------------------------------------------- forward

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SharedCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V], or of ``logits_to_keep`` tokens alone; and the loss where ``labels`` are given.

        ``logits_to_keep``: so many last tokens (0: all), or a tensor of positions [N].

        The arguments of transformers' causal models; see :meth:`SharedLlamaModel.forward` for what masks and positions mean.

        Raises:
            TypeError: an argument that this model does not know, or ``output_attentions``.
        """
        if kwargs.get("output_attentions"):
            raise TypeError(
                "effcore: output_attentions is not supported: the attention ops never write the probabilities out"
            )
        unknown = set(kwargs) - _LOSS_ARGUMENTS - _IGNORED_ARGUMENTS
        if unknown:
            raise TypeError(f"effcore: {type(self).__name__}.forward got unexpected arguments {sorted(unknown)}")
        if (
            labels is None
            and inputs_embeds is None
            and document_ids is None
            and cu_seqlens is None
            and cu_seq_lens_q is None
            and not output_hidden_states
            and isinstance(logits_to_keep, int)
            and can_replay(past_key_values, input_ids, attention_mask, self)
        ):
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
            inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
            return CausalLMOutputWithPast(
                logits=past_key_values.graph.step(self, past_key_values, inputs), past_key_values=past_key_values
            )
        # The last so many tokens (0: all), or the positions in a tensor.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep > 0 and labels is None else None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            document_ids=document_ids,
            cu_seqlens=cu_seq_lens_q if cu_seqlens is None else cu_seqlens,
            last=last,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss_arguments = {k: v for k, v in kwargs.items() if k in _LOSS_ARGUMENTS}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_arguments)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``from_pretrained``, for this model's checkpoints and for those of the LLaMA family.

        The latter load with nothing shared: safetensors folders (fused ``qkv_proj`` and ``gate_up_proj`` are split) and
        GGUF files (``gguf_file=...``).
        """
        from effcore.models.checkpoint import load_pretrained

        return load_pretrained(cls, super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
