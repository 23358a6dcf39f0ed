"""effcore: train and run neural networks with less compute.

Importing this package is cheap: torch, transformers and the native libraries are loaded when a name is first used.
:mod:`effcore.array` works on NumPy and CuPy arrays without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> module that defines it.
_EXPORTS = {
    "share_activations": "effcore.models.convert",
    "skip_tokens": "effcore.methods.skipvit",
    "SwiftLearnSampler": "effcore.methods.swiftlearn",
    "TTCEarlyStopping": "effcore.methods.ttc",
    "VerifierTTT": "effcore.methods.vds_ttt",
    "factorize_conv3d": "effcore.methods.conv3d",
    "decompose": "effcore.methods.low_rank",
    "laplace": "effcore.methods.bayesian_moe",
    "grouped_gram": "effcore.ops.kronecker",
    "grouped_lowrank_update": "effcore.ops.kronecker",
    "kron_variance": "effcore.ops.kronecker",
    "attention": "effcore.ops.attention",
    "attention_with_scores": "effcore.ops.attention",
    "attention_from_scores": "effcore.ops.attention",
    "share_kv": "effcore.ops.attention",
    "attention_shared_kv": "effcore.ops.attention",
    "decode_attention": "effcore.ops.attention",
    "decode_from_probs": "effcore.ops.attention",
    "SharedScores": "effcore.ops.attention",
    "SharedKV": "effcore.ops.attention",
    "partition_tokens": "effcore.ops.routing",
    "gather_tokens": "effcore.ops.routing",
    "separate_tokens": "effcore.ops.routing",
    "merge_tokens": "effcore.ops.routing",
    "class_scores": "effcore.ops.routing",
    "cross_conv3d": "effcore.ops.conv3d",
    "causal_conv1d": "effcore.ops.scan",
    "selective_scan": "effcore.ops.scan",
    "selective_step": "effcore.ops.scan",
    "FlowHNConfig": "effcore.models.flowhn_config",
    "FlowHNForCausalLM": "effcore.models.flowhn",
    "lowrank_linear": "effcore.ops.lowrank",
}
_SUBMODULES = ("array", "cli", "data", "methods", "models", "nn", "ops", "reference", "training")

if TYPE_CHECKING:
    from effcore.methods.bayesian_moe import laplace
    from effcore.methods.conv3d import factorize_conv3d
    from effcore.methods.low_rank import decompose
    from effcore.methods.skipvit import skip_tokens
    from effcore.methods.swiftlearn import SwiftLearnSampler
    from effcore.methods.ttc import TTCEarlyStopping
    from effcore.methods.vds_ttt import VerifierTTT
    from effcore.models.convert import share_activations
    from effcore.models.flowhn import FlowHNForCausalLM
    from effcore.models.flowhn_config import FlowHNConfig
    from effcore.ops.attention import (
        SharedKV,
        SharedScores,
        attention,
        attention_from_scores,
        attention_shared_kv,
        attention_with_scores,
        decode_attention,
        decode_from_probs,
        share_kv,
    )
    from effcore.ops.conv3d import cross_conv3d
    from effcore.ops.kronecker import grouped_gram, grouped_lowrank_update, kron_variance
    from effcore.ops.lowrank import lowrank_linear
    from effcore.ops.routing import class_scores, gather_tokens, merge_tokens, partition_tokens, separate_tokens
    from effcore.ops.scan import causal_conv1d, selective_scan, selective_step

__all__ = [  # noqa: RUF022 (grouped as the documentation groups them)
    "share_activations",
    "skip_tokens",
    "SwiftLearnSampler",
    "TTCEarlyStopping",
    "VerifierTTT",
    "factorize_conv3d",
    "decompose",
    "laplace",
    "attention",
    "attention_with_scores",
    "attention_from_scores",
    "share_kv",
    "attention_shared_kv",
    "decode_attention",
    "decode_from_probs",
    "SharedScores",
    "SharedKV",
    "partition_tokens",
    "gather_tokens",
    "separate_tokens",
    "merge_tokens",
    "class_scores",
    "cross_conv3d",
    "causal_conv1d",
    "selective_scan",
    "selective_step",
    "FlowHNConfig",
    "FlowHNForCausalLM",
    "lowrank_linear",
    "grouped_gram",
    "grouped_lowrank_update",
    "kron_variance",
]


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"effcore.{name}")
    raise AttributeError(f"module 'effcore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, *_SUBMODULES})
