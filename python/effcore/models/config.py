"""The configuration of LLaMA-family models whose layers share attention activations."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PretrainedConfig

from effcore.models.layout import Layout

MODES = ("qk", "kv")
OWNERS = ("layer", "projection")

# What a foreign configuration may say that this model does not do: attribute -> the values that mean "off".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (None, 0, 0.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "pretraining_tp": (None, 0, 1),
    "attention_chunk_size": (None,),
}


@strict
class SharedLlamaConfig(LlamaConfig):
    """A LLaMA configuration with a sharing layout, and the options that tell Llama, Mistral, Qwen2 and Qwen3 apart.

    Args:
        share_mode: ``"qk"``: consumers use the owner's softmax(QKᵀ) and their own V (EPAS). ``"kv"``: consumers use the
            owner's K and V and their own Q (ECHO-LLaMA).
        share_layout: one owner index per layer, ``"0_1_2_2"`` (:class:`effcore.models.Layout`); None shares nothing.
        share_owner: mode ``kv`` only. ``"layer"``: the owner layer's own K,V. ``"projection"``: one more norm and K,V
            projection of its output (YOCO).
        dropped_projections: consumer layers whose unused projections are not part of the checkpoint any more.
        qkv_bias: biases on Q, K and V alone (Qwen2); ``attention_bias`` adds them on the output projection too.
        qk_norm: RMSNorm of each head's queries and keys before RoPE (Qwen3).
        sliding_window: keys that a layer of type ``"sliding_attention"`` sees, itself included.
        layer_types: ``"full_attention"`` or ``"sliding_attention"`` for each layer; None: all of them full.

    Raises:
        ValueError: an unknown mode or owner, a layout that does not fit, attention dropout.
    """

    model_type = "effcore_llama"

    share_mode: str = "qk"
    share_layout: str | None = None
    share_owner: str = "layer"
    dropped_projections: list[int] | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.share_layout is None:
            self.share_layout = str(Layout.full(self.num_hidden_layers))
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        self.dropped_projections = sorted(self.dropped_projections or [])

    def validate_architecture(self) -> None:
        """Called by ``@strict`` after construction: what the fields must satisfy together."""
        if self.share_mode not in MODES:
            raise ValueError(f"effcore: share_mode must be 'qk' or 'kv', got {self.share_mode!r}")
        if self.share_owner not in OWNERS:
            raise ValueError(f"effcore: share_owner must be 'layer' or 'projection', got {self.share_owner!r}")
        if self.share_owner == "projection" and self.share_mode != "kv":
            raise ValueError("effcore: share_owner='projection' needs share_mode='kv': it projects keys and values")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"effcore: {self.num_attention_heads} query heads are not a multiple of {self.num_key_value_heads} kv heads"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"effcore: layer_types names {len(self.layer_types)} of {self.num_hidden_layers} layers")
        for name, off in _UNSUPPORTED.items():
            if getattr(self, name, None) not in off:
                raise ValueError(f"effcore: {name}={getattr(self, name)!r} is not supported; set it to {off[0]!r}")
        if self.share_layout is not None:
            self.check_layout(Layout.parse(self.share_layout))

    def check_layout(self, layout: Layout) -> None:
        """Raises ValueError where the model cannot be run with ``layout``."""
        layout.check_layers(self.num_hidden_layers)
        for layer in self.dropped_projections or []:
            if not layout.is_consumer(layer):
                raise ValueError(
                    f"effcore: layout {layout} lets layer {layer} compute its own activations, but its projections were dropped"
                )
        if self.share_mode == "qk" and self.layer_types is not None:
            for owner, consumers in layout.groups.items():
                for layer in consumers:
                    if self.layer_types[layer] != self.layer_types[owner]:
                        raise ValueError(
                            f"effcore: layer {layer} ({self.layer_types[layer]}) cannot use the scores of layer {owner} "
                            f"({self.layer_types[owner]}): they see different keys"
                        )

    @property
    def layout(self) -> Layout:
        return Layout.parse(self.share_layout) if self.share_layout else Layout.full(self.num_hidden_layers)

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, or None where it sees all keys."""
        types = self.layer_types or []
        return self.sliding_window if types and types[layer] == "sliding_attention" else None

    @classmethod
    def from_hf(cls, config: PretrainedConfig, **sharing: Any) -> SharedLlamaConfig:
        """The architecture of a Llama, Mistral, Qwen2 or Qwen3 configuration, with the fields of ``sharing``.

        Raises:
            ValueError: another architecture, or an option that this model does not do; named.
        """
        kind = config.model_type
        if kind not in ("llama", "mistral", "qwen2", "qwen3"):
            raise ValueError(
                f"effcore: configurations of type 'llama', 'mistral', 'qwen2' and 'qwen3' can be converted, got {kind!r}"
            )
        for name, off in _UNSUPPORTED.items():
            if getattr(config, name, None) not in off:
                raise ValueError(
                    f"effcore.share_activations: {type(config).__name__} has {name}={getattr(config, name)!r}, which is not "
                    f"supported; set model.config.{name} = {off[0]!r} to convert without it"
                )
        rotary = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        if rotary != 1.0:
            raise ValueError(f"effcore.share_activations: partial_rotary_factor={rotary} is not supported, only 1.0")
        fields = config.to_dict()
        for name in ("model_type", "architectures", "layer_types", "use_sliding_window", "max_window_layers"):
            fields.pop(name, None)
        layers = config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        # Mistral has one window for all layers; the Qwens name each layer's type.
        types = getattr(config, "layer_types", None) or [("sliding" if window else "full") + "_attention"] * layers
        other = set(types) - {"full_attention", "sliding_attention"}
        if other:
            raise ValueError(f"effcore.share_activations: layers of type {sorted(other)} are not supported")
        fields.update(
            sliding_window=window if "sliding_attention" in types else None,
            layer_types=list(types),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            attention_bias=bool(getattr(config, "attention_bias", False)),
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        )
        fields.update(sharing)
        return cls(**fields)
