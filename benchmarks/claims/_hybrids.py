"""The models of FlowHN's claim: its strategies, a LLaMA and the hybrids of transformers, of the same width and about as many
parameters; and the FLOPs of each by one count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.falcon_h1 import modeling_falcon_h1
from transformers.models.jamba import modeling_jamba

import effcore
from effcore.methods.flowhn import model_flops

STRATEGIES = {
    "none": "FlowHN, no split",
    "sequential": "sequential hybrid",
    "ae": "FlowHN, AE",
    "fa": "FlowHN, FA",
    "fac": "FlowHN, FAC",
}
# The paper's 1B models: tokens a second, model FLOPs utilization in percent, mean accuracy in percent.
PAPER = {
    "FlowHN, no split": (4325, 45.0, 42.95),
    "sequential hybrid": (4923, 47.4, 42.06),
    "FlowHN, AE": (7752, 46.2, 40.17),
    "FlowHN, FA": (7901, 47.5, 38.50),
    "FlowHN, FAC": (7926, 47.6, 41.97),
}
QUICK: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 512,
}
HALF_PRECISION_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOPs a second


def config(size: str, strategy: str, length: int) -> effcore.FlowHNConfig:
    fields: dict[str, Any] = {"strategy": strategy, "routing_length": length}
    return effcore.FlowHNConfig(**QUICK, **fields) if size == "toy" else effcore.FlowHNConfig.of_size(size, **fields)


def _like(size: str) -> dict[str, Any]:
    """The fields of a FlowHN configuration that every model has."""
    c = config(size, "none", 1024)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return {n: getattr(c, n) for n in names} | {"tie_word_embeddings": True, "attn_implementation": "sdpa"}


def _llama(size: str, layers: int) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**_like(size), num_hidden_layers=layers))


def _falcon(size: str, layers: int) -> nn.Module:
    """Mamba-2 and attention in parallel on all tokens, one MLP."""
    fields = _like(size)
    inner = 2 * fields["hidden_size"]
    fields |= {"mamba_d_ssm": inner, "mamba_n_heads": inner // 32, "mamba_d_head": 32, "mamba_d_state": 16}
    fields |= {"num_hidden_layers": layers, "mamba_n_groups": 1, "mamba_chunk_size": 128}
    return FalconH1ForCausalLM(FalconH1Config(**fields))


def _jamba(size: str, layers: int) -> nn.Module:
    """Mamba-1 and attention layers in turns, no experts."""
    fields = _like(size) | {"num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
    fields |= {"mamba_dt_rank": fields["hidden_size"] // 16, "num_hidden_layers": layers}
    return JambaForCausalLM(JambaConfig(**fields))


OTHERS: dict[str, Callable[[str, int], nn.Module]] = {
    "LLaMA": _llama,
    "Falcon-H1 (transformers)": _falcon,
    "Jamba (transformers)": _jamba,
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def other(name: str, size: str, length: int, device: str, dtype: torch.dtype) -> nn.Module:
    """One of OTHERS with as many layers as bring it nearest to the parameters of FlowHN."""
    with torch.device("meta"):
        goal = parameters(effcore.FlowHNForCausalLM(config(size, "fac", length)))
        two, four = (parameters(OTHERS[name](size, n)) for n in (2, 4))
    layers = max(2, 2 * round((goal - two) / (four - two)) + 2)
    with torch.device(device):
        return OTHERS[name](size, layers).to(dtype)


def flowhn(strategy: str, size: str, length: int, device: str, dtype: torch.dtype) -> nn.Module:
    with torch.device(device):
        model: nn.Module = effcore.FlowHNForCausalLM(config(size, strategy, length))
    return model.to(dtype)


def layers_of(model: Any) -> Iterator[nn.Module]:
    yield from model.model.layers


def compiled(model: Any) -> Any:
    """``model`` with its layers compiled, on a GPU."""
    if next(model.parameters()).is_cuda:
        for layer in layers_of(model):
            layer.compile(dynamic=False)  # a size a strategy: none of them changes
    return model


@contextmanager
def kernels_beside_graphs() -> Iterator[None]:
    """While this is open the compiler leaves out of its graphs the kernels that transformers' hybrids call. Left to itself
    torch 2.11 tells them, while it compiles, that it exports, and they take their torch paths."""
    with ExitStack() as stack:
        for module, name in (
            (modeling_falcon_h1, "mamba2_split_conv1d_scan_combined"),
            (modeling_jamba, "causal_conv1d_fn"),
            (modeling_jamba, "mamba_selective_scan"),
        ):
            stack.enter_context(mock.patch.object(module, name, torch.compiler.disable(getattr(module, name))))
        yield


def forward_flops(model: Any, length: int) -> float:
    """Of one text: two a weight of each matrix and token, the causal half of the attention products, 7 a state of a scan."""
    if isinstance(model, effcore.FlowHNForCausalLM):
        return model_flops(model.config)
    c = model.config
    heads = c.hidden_size // c.num_attention_heads * c.num_attention_heads
    inner = 2 * c.hidden_size
    total = 2.0 * length * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    for layer in layers_of(model):
        total += 2.0 * length * length * heads if hasattr(layer, "self_attn") else 0.0
        total += 7.0 * length * inner * c.mamba_d_state if hasattr(layer, "mamba") else 0.0
    return total
