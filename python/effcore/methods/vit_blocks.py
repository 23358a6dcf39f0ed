"""What SkipViT needs to know of vision transformers: their blocks, their protected tokens, and the scores of their patches.

Works on the model object: Hugging Face's ViT and DeiT and timm's VisionTransformer are recognised by name and by their
parts, and neither library is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcore.ops import routing

SUPPORTED = "Hugging Face ViT and DeiT models, and timm's VisionTransformer"


@dataclass(frozen=True)
class Architecture:
    """The blocks of a model, how many of its first tokens are no patches, and whether a class token reads the patches."""

    blocks: nn.Module  # a ModuleList or Sequential
    prefix: int
    class_token: bool


def architecture(model: nn.Module) -> Architecture:
    """
    Raises:
        TypeError: not one of the supported models; says which are.
    """
    names = {c.__name__ for c in type(model).__mro__}
    found: Architecture | None = None
    if "VisionTransformer" in names and hasattr(model, "num_prefix_tokens"):
        has_class_token = getattr(model, "cls_token", None) is not None
        pooled = getattr(model, "global_pool", "token") not in ("token", "")
        prefix_tokens: Any = model.num_prefix_tokens
        found = Architecture(_part(model, "blocks"), int(prefix_tokens), has_class_token and not pooled)
    else:
        base: Any = getattr(model, str(getattr(model, "base_model_prefix", "") or "-"), model)
        prefixes = {"ViTModel": 1, "DeiTModel": 2}
        prefix = next((prefixes[c.__name__] for c in type(base).__mro__ if c.__name__ in prefixes), None)
        if prefix is not None:
            blocks = base.layers if hasattr(base, "layers") else _part(base, "encoder", "layer")
            found = Architecture(blocks, prefix, True)
    if found is None:
        raise TypeError(f"effcore.skip_tokens: {type(model).__name__} is not supported; supported are {SUPPORTED}")
    for number, block in enumerate(found.blocks.children()):
        projections(block, number)
    return found


def _part(module: Any, *path: str) -> Any:
    for name in path:
        module = getattr(module, name, None)
    return module


@dataclass(frozen=True)
class Projections:
    """Where a block makes its queries and keys."""

    norm: nn.Module
    query: nn.Module | None
    key: nn.Module | None
    fused: nn.Module | None  # queries, keys and values in one
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    heads: int
    scale: float


def projections(block: nn.Module, number: int = -1) -> Projections:
    """
    Raises:
        TypeError: the block is built otherwise.
    """
    if _part(block, "attn", "qkv") is not None and any(c.__name__ == "Block" for c in type(block).__mro__):
        attn: Any = block.attn
        return Projections(
            _part(block, "norm1"),
            None,
            None,
            attn.qkv,
            _part(attn, "q_norm"),
            _part(attn, "k_norm"),
            attn.num_heads,
            attn.scale,
        )
    attention: Any = _part(block, "attention")
    if hasattr(attention, "attention"):
        attention = attention.attention
    query = _part(attention, "q_proj") or _part(attention, "query")
    key = _part(attention, "k_proj") or _part(attention, "key")
    norm, heads = _part(block, "layernorm_before"), _part(attention, "num_attention_heads")
    if query is None or key is None or norm is None or heads is None:
        raise TypeError(
            f"effcore.skip_tokens: block {number} ({type(block).__name__}) is not a pre-norm block of {SUPPORTED}"
        )
    width = query.out_features // heads
    return Projections(norm, query, key, None, None, None, heads, getattr(attention, "scaling", width**-0.5))


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H·D] -> [B, H, N, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _is_plain(module: nn.Module | None) -> bool:
    return type(module) is nn.Linear


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or type(module) is nn.Identity


def class_partition(block: nn.Module, x: Tensor, keep: int, protect: int) -> tuple[Tensor, Tensor]:
    """The partition by the class token's attention in this block, the head mean of softmax(q_cls Kᵀ · scale).

    One row beside the block's own attention. Where keys are a plain linear map K = x W + b, no key is computed:
    q · (x W + b) = (q Wᵀ) · x + const, and a softmax does not see the constant: H·C instead of C² products a token.
    """
    p = projections(block)
    x = p.norm(x)
    first = x[:, :1]
    if p.fused is not None and _is_plain(p.fused):
        size = p.fused.weight.shape[0] // 3  # type: ignore[index, operator]
        weight: Any = p.fused.weight
        bias: Any = p.fused.bias
        q = F.linear(first, weight[:size], None if bias is None else bias[:size])
        key_weight = weight[size : 2 * size]
    elif p.fused is not None:
        q, k, _ = (_heads(t, p.heads) for t in p.fused(x).chunk(3, dim=-1))
        q, k = _normed(p.q_norm, q[:, :, :1]), _normed(p.k_norm, k)
        return routing.score_partition(q.to(k.dtype), k, keep, protect=protect, scale=p.scale)
    else:
        assert p.query is not None and p.key is not None
        q = p.query(first)
        key_weight = p.key.weight if _is_plain(p.key) else None
    q = _normed(p.q_norm, _heads(q, p.heads))
    if key_weight is None or not _is_identity(p.k_norm):
        k = p.key(x) if p.key is not None else F.linear(x, key_weight, None if bias is None else bias[size : 2 * size])
        k = _normed(p.k_norm, _heads(k, p.heads))
        return routing.score_partition(q.to(k.dtype), k, keep, protect=protect, scale=p.scale)
    # Under autocast q is of its dtype, and so are the rows that the block's own projections read.
    towards = (q.transpose(0, 1)[:, :, 0] @ key_weight.unflatten(0, (p.heads, -1)).to(q.dtype)).transpose(0, 1)
    rows = x.to(towards.dtype)[:, None]
    return routing.score_partition(towards[:, :, None], rows, keep, protect=protect, scale=p.scale)


def mean_partition(block: nn.Module, x: Tensor, keep: int, protect: int) -> tuple[Tensor, Tensor]:
    """The partition by the attention that a token gets from all tokens: for models that pool."""
    p = projections(block)
    x = p.norm(x)
    if p.fused is not None and _is_plain(p.fused):
        size = p.fused.weight.shape[0] // 3 * 2  # type: ignore[index, operator]
        weight: Any = p.fused.weight
        bias: Any = p.fused.bias
        q, k = F.linear(x, weight[:size], None if bias is None else bias[:size]).chunk(2, dim=-1)
    elif p.fused is not None:
        q, k, _ = p.fused(x).chunk(3, dim=-1)
    else:
        assert p.query is not None and p.key is not None
        q, k = p.query(x), p.key(x)
    q, k = _normed(p.q_norm, _heads(q, p.heads)), _normed(p.k_norm, _heads(k, p.heads))
    return routing.partition_tokens(routing.mean_scores(q, k.to(q.dtype), p.scale), keep, protect=protect)


def random_partition(block: nn.Module, x: Tensor, keep: int, protect: int) -> tuple[Tensor, Tensor]:
    """Any patches: what an informed choice is measured against."""
    return routing.partition_tokens(torch.rand(x.shape[:2], device=x.device), keep, protect=protect)
