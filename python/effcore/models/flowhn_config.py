"""The configuration of FlowHN language models."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig

from effcore.methods.flowhn import STRATEGIES, attention_tokens

# hidden_size, intermediate_size, blocks, heads; 8 kv heads of 64 each. A block holds a layer of either kind.
SIZES = {
    "135M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16, "num_attention_heads": 8},
    "350M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 11, "num_attention_heads": 16},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 32},
}
_SIZES_OF_PARTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "state_size",
    "conv_width",
    "expand",
    "routing_length",
)


@strict
class FlowHNConfig(PretrainedConfig):
    """A parallel hybrid of attention and a state-space model.

    Args:
        num_hidden_layers: blocks; each holds an attention layer and an SSM layer.
        strategy: which tokens each branch sees: ``"none"`` (all to both), ``"ae"``, ``"fa"``, ``"fac"``, or ``"sequential"``,
            the two layers one after the other (:mod:`effcore.methods.flowhn`).
        routing_length: R, the tokens of a routing chunk: the length of training, as a rule.
        attention_tokens: of a routing chunk, for ``fa`` and ``fac``; None: where both branches cost the same.
        state_size, conv_width, expand, dt_rank: of the SSM (Mamba-1); dt_rank 0: hidden_size / 16.
        head_dim: 0: hidden_size / num_attention_heads.

    Raises:
        ValueError: an unknown strategy, a size that is not positive, or a split outside the routing chunk.
    """

    model_type = "effcore_flowhn"

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 11
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 0
    state_size: int = 16
    conv_width: int = 4
    expand: int = 2
    dt_rank: int = 0
    strategy: str = "fac"
    routing_length: int = 1024
    attention_tokens: int | None = None
    hidden_act: str = "silu"
    mlp_bias: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 1 << 20
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not self.head_dim:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if not self.dt_rank:
            self.dt_rank = math.ceil(self.hidden_size / 16)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Called by ``@strict`` after construction: what the fields must satisfy together."""
        if self.strategy not in STRATEGIES:
            raise ValueError(f"effcore: strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        for name in _SIZES_OF_PARTS:
            if getattr(self, name) < 1:
                raise ValueError(f"effcore: {name} must be positive, got {getattr(self, name)}")
        n = self.attention_tokens
        if n is not None and not 0 <= n <= self.routing_length:
            raise ValueError(
                f"effcore: attention_tokens must be from 0 to routing_length ({self.routing_length}), got {n}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"effcore: {self.num_attention_heads} query heads are not a multiple of {self.num_key_value_heads} kv heads"
            )

    @property
    def inner_size(self) -> int:
        """Channels of the SSM."""
        return self.expand * self.hidden_size

    @property
    def split(self) -> int:
        """Tokens of a routing chunk that attention takes."""
        return attention_tokens(self)

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> FlowHNConfig:
        """The configuration of about so many parameters: ``"135M"``, ``"350M"`` or ``"1B"``."""
        if size not in SIZES:
            raise ValueError(f"effcore: size must be one of {', '.join(SIZES)}, got {size!r}")
        return cls(**(SIZES[size] | fields))
