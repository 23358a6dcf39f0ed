"""What SkipViT needs to know of vision transformers: their blocks, their protected tokens, and the scores of their patches.

Works on the model object: Hugging Face's ViT and DeiT and timm's VisionTransformer are recognised by name and by their
parts, and neither library is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effcore.ops import routing

SUPPORTED = "Hugging Face ViT and DeiT models, and timm's VisionTransformer"


@dataclass(frozen=True)
class Architecture:
    """The blocks of a model, how many of its first tokens are no patches, and whether a class token reads the patches."""

    blocks: nn.Module  # a ModuleList or Sequential
    prefix: int
    class_token: bool
    masking: nn.Module | None = None  # transformers' own forward around them, which makes their masks


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
            own = type(base).forward.__module__.startswith("transformers.")
            found = Architecture(blocks, prefix, True, base if own else None)
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


class Shared(nn.Module):
    """Mixed into the class of a module that a block runs and its scores read too: computed once for the same tensor."""

    # What came in and what went out, while the block runs. It serves this very tensor alone, so that several forwards at once
    # compute what they need themselves.
    _shared: tuple[Tensor, Tensor] | None

    def forward(self, x: Tensor) -> Tensor:
        shared = self._shared
        return shared[1] if shared is not None and shared[0] is x else super().forward(x)


def shared_modules(block: nn.Module) -> list[nn.Module]:
    """On the way to a block's queries and keys."""
    p = projections(block)
    return [m for m in (p.norm, p.query, p.key, p.fused) if m is not None]


def forget(block: nn.Module) -> None:
    """The end of the sharing; the tensors are released."""
    for module in shared_modules(block):
        if isinstance(module, Shared):
            module._shared = None


def _once(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x)
    if isinstance(module, Shared):
        module._shared = (x, y)
    return y


def _heads(norm: nn.Module | None, x: Tensor, heads: int) -> Tensor:
    """[B, N, H·D] -> [B, H, N, D]"""
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return x if norm is None else norm(x)


def _queries_and_keys(block: nn.Module, x: Tensor, queries: int | None = None) -> tuple[Tensor, Tensor]:
    """The block's own, of its first so many tokens and of all, without their gradient."""
    p = projections(block)
    x = _once(p.norm, x)
    if p.fused is not None:
        q, k, _ = _once(p.fused, x).detach().chunk(3, dim=-1)
    else:
        assert p.query is not None and p.key is not None
        q, k = _once(p.query, x).detach(), _once(p.key, x).detach()
    with torch.no_grad():
        q, k = _heads(p.q_norm, q[:, :queries], p.heads), _heads(p.k_norm, k, p.heads)
        return q.to(k.dtype), k


def class_partition(block: nn.Module, x: Tensor, keep: int, protect: int) -> tuple[Tensor, Tensor]:
    """The partition by the class token's attention in this block, the head mean of softmax(q_cls Kᵀ · scale).

    One row beside the block's own attention, from its queries and keys.
    """
    q, k = _queries_and_keys(block, x, 1)
    return routing.score_partition(q, k, keep, protect=protect, scale=projections(block).scale)


def mean_partition(block: nn.Module, x: Tensor, keep: int, protect: int) -> tuple[Tensor, Tensor]:
    """The partition by the attention that a token gets from all tokens: for models that pool."""
    q, k = _queries_and_keys(block, x)
    return routing.partition_tokens(routing.mean_scores(q, k, projections(block).scale), keep, protect=protect)


def random_partition(block: nn.Module, x: Tensor, keep: int, protect: int) -> tuple[Tensor, Tensor]:
    """Any patches: what an informed choice is measured against."""
    return routing.partition_tokens(torch.rand(x.shape[:2], device=x.device), keep, protect=protect)
