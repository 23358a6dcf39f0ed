"""Hugging Face models whose layers share attention activations, and the one line that makes them of existing ones; FlowHN."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from effcore.models.cache import SharedCache, cache_bytes_per_token
from effcore.models.config import SharedLlamaConfig
from effcore.models.convert import share_activations
from effcore.models.decoder import SharedLlamaModel
from effcore.models.flowhn import FlowHNForCausalLM, FlowHNModel
from effcore.models.flowhn_cache import FlowHNCache
from effcore.models.flowhn_config import FlowHNConfig
from effcore.models.layout import Layout
from effcore.models.llama import SharedLlamaForCausalLM

__all__ = [
    "FlowHNCache",
    "FlowHNConfig",
    "FlowHNForCausalLM",
    "FlowHNModel",
    "Layout",
    "SharedCache",
    "SharedLlamaConfig",
    "SharedLlamaForCausalLM",
    "SharedLlamaModel",
    "cache_bytes_per_token",
    "share_activations",
]

AutoConfig.register(SharedLlamaConfig.model_type, SharedLlamaConfig, exist_ok=True)
AutoModel.register(SharedLlamaConfig, SharedLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(SharedLlamaConfig, SharedLlamaForCausalLM, exist_ok=True)
AutoConfig.register(FlowHNConfig.model_type, FlowHNConfig, exist_ok=True)
AutoModel.register(FlowHNConfig, FlowHNModel, exist_ok=True)
AutoModelForCausalLM.register(FlowHNConfig, FlowHNForCausalLM, exist_ok=True)
