"""A decoder layer that can own attention activations or use another layer's.

The layer is cut where attention stands. What lies around it are *pieces*, pure functions of a layer and tensors: norm + QKV,
norm + V, norm + Q, output + MLP. They never depend on the layout, so compiling them (``model.compile_pieces()``) makes a
constant number of graphs, however the shared region grows; the sharing op is called between them. What a piece gives is
token-major, [B, S, H, D], and turned to [B, H, S, D] outside: AOTAutograd takes the gradients of a compiled piece's results as
contiguous and copies those that are not, and attention's gradients have the memory order of its inputs.

What a group shares goes from layer to layer as a plain positional object (SharedScores, SharedKV, DecodeProbs): FSDP2 casts and
copies tensors, dicts and tuples that it finds in a module's arguments, and leaves such objects alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, rotate_half

from effcore.models.cache import SharedCache
from effcore.models.config import SharedLlamaConfig
from effcore.ops import _attention_plan as plan
from effcore.ops import attention as ops


class Visibility:
    """What the queries of one pass see, as the attention ops take it. A plain object, for the reason given above.

    ``decoding`` passes have one query a row, know ``lengths``, and are not differentiable.
    """

    __slots__ = ("decoding", "first_key", "lengths")

    def __init__(self, lengths: Tensor | None, first_key: Tensor | None, decoding: bool):
        self.lengths, self.first_key, self.decoding = lengths, first_key, decoding

    def arguments(self) -> dict[str, Any]:
        return {"causal": True, "lengths": self.lengths, "first_key": self.first_key}


def wants_gradients(decoder: nn.Module, hidden: Tensor) -> bool:
    """Whether a gradient will flow through this pass: to what enters it, or to a parameter. Embeddings may be frozen while what
    lies behind them trains (adapters)."""
    return torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in decoder.parameters()))


class SharedAttention(nn.Module):
    """The projections of one layer, under the names that transformers gives them; one that was dropped is None."""

    q_norm: nn.Module | None
    k_norm: nn.Module | None

    def __init__(self, config: SharedLlamaConfig, layer_idx: int):
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim or config.hidden_size // config.num_attention_heads
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(head_dim, eps=config.rms_norm_eps)
        self.configure(config, layer_idx)

    def configure(self, config: SharedLlamaConfig, layer_idx: int) -> None:
        """What is not a parameter; the whole of it where a transformers module becomes one of these."""
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.layer_idx = layer_idx
        if not config.qk_norm:
            self.q_norm = self.k_norm = None
        if layer_idx in (config.dropped_projections or []):
            self.drop(unused_projections(config.share_mode))

    def drop(self, names: tuple[str, ...]) -> None:
        for name in names:
            delattr(self, name)
            self.register_module(name, None)


def unused_projections(mode: str) -> tuple[str, ...]:
    """The projections (and their norms) that a consumer does not use."""
    return ("q_proj", "k_proj", "q_norm", "k_norm") if mode == "qk" else ("k_proj", "v_proj", "k_norm")


# ---------------------------------------------------------------- the pieces around attention


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on [B, S, H, D]; cos and sin are [1 or B, S, D]."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return x * cos + rotate_half(x) * sin


def split_heads(projected: Tensor, head_dim: int) -> Tensor:
    """[B, S, H·D] -> [B, S, H, D], a view."""
    return projected.unflatten(-1, (-1, head_dim))


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, S, H, D] -> [B, H, S, D] of each, views."""
    return tuple(t.transpose(1, 2) for t in tensors)


def _queries(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q = split_heads(attention.q_proj(x), attention.head_dim)
    return rotate(q if attention.q_norm is None else attention.q_norm(q), cos, sin)


def _keys(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    k = split_heads(attention.k_proj(x), attention.head_dim)
    return rotate(k if attention.k_norm is None else attention.k_norm(k), cos, sin)


def project_qkv(layer: SharedDecoderLayer, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, projections, q/k norms and RoPE: q [B, S, Hq, D], k and v [B, S, Hkv, D], in one dtype (autocast: v's)."""
    x, attention = layer.input_layernorm(hidden), layer.self_attn
    v = split_heads(attention.v_proj(x), attention.head_dim)
    return _queries(attention, x, cos, sin).to(v.dtype), _keys(attention, x, cos, sin).to(v.dtype), v


def project_qkv_into(
    layer: SharedDecoderLayer, hidden: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> Tensor:
    """The same while decoding behind a static cache: gives q and writes k and v to tokens ``slots`` of its buffers
    [B, Hkv, capacity, D]. In one piece, so that a compiler writes what it rotates where it belongs."""
    q, k, v = project_qkv(layer, hidden, cos, sin)
    keys.index_copy_(2, slots, k.transpose(1, 2))
    values.index_copy_(2, slots, v.transpose(1, 2))
    return q


def project_q(layer: SharedDecoderLayer, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A consumer of mode ``kv``: its queries [B, S, Hq, D]."""
    return _queries(layer.self_attn, layer.input_layernorm(hidden), cos, sin)


def project_v(layer: SharedDecoderLayer, hidden: Tensor) -> Tensor:
    """A consumer of mode ``qk``: its values [B, S, Hkv, D]."""
    attention = layer.self_attn
    return split_heads(attention.v_proj(layer.input_layernorm(hidden)), attention.head_dim)


def project_v_into(layer: SharedDecoderLayer, hidden: Tensor, values: Tensor, slots: Tensor) -> None:
    """The same while decoding behind a static cache: written to tokens ``slots`` of its buffer [B, Hkv, capacity, D]."""
    values.index_copy_(2, slots, project_v(layer, hidden).transpose(1, 2))


def finish(layer: SharedDecoderLayer, hidden: Tensor, attended: Tensor) -> Tensor:
    """Output projection, residual, MLP."""
    hidden = hidden + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


class Pieces(NamedTuple):
    """The functions around attention, as they are or compiled."""

    project_qkv: Callable[..., tuple[Tensor, Tensor, Tensor]] = project_qkv
    project_qkv_into: Callable[..., Tensor] = project_qkv_into
    project_q: Callable[..., Tensor] = project_q
    project_v: Callable[..., Tensor] = project_v
    project_v_into: Callable[..., None] = project_v_into
    finish: Callable[..., Tensor] = finish


PIECES = Pieces()


class SharedDecoderLayer(GradientCheckpointingLayer):
    """One decoder layer: own attention, owner of a group, or consumer of one; the arguments of the call say which."""

    def __init__(self, config: SharedLlamaConfig, layer_idx: int):
        super().__init__()
        self.self_attn = SharedAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.pieces = PIECES

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        seen: Visibility,
        cache: SharedCache | None = None,
        shared: ops.SharedScores | ops.SharedKV | ops.DecodeProbs | None = None,
        mode: str = "qk",
        consumers: int = 0,
        keep: str = "auto",
        last: int | None = None,
    ) -> tuple[Tensor, Any]:
        """[B, S, C] -> the layer's output, and what its group's consumers get: a tuple of SharedScores, a SharedKV, or None.

        Args:
            cos, sin: [1 or B, S, D] of the tokens' positions.
            shared: what the owner gave, in a consumer.
            consumers: layers that will use this layer's activations.
            last: go on with the last tokens alone, once K and V of all are known; ``seen`` describes these.
        """
        layer_idx = self.self_attn.layer_idx
        produced: Any = None
        places = cache.places(layer_idx, hidden.shape[1]) if cache is not None and seen.decoding else None
        if isinstance(shared, ops.SharedKV):
            (q,) = heads_first(self.pieces.project_q(self, hidden, cos, sin).to(shared.k.dtype))
            attended = _attend_kv(q, shared, seen, self.self_attn.scaling)
        elif shared is not None:
            if places is not None:
                _, v, slots = places
                self.pieces.project_v_into(self, hidden, v, slots)
            else:
                (v,) = heads_first(self.pieces.project_v(self, hidden))
                if cache is not None:
                    v = cache.append_v(layer_idx, v)
            if isinstance(shared, ops.SharedScores):
                attended = ops.attention_from_scores(shared, v)
            else:
                assert seen.lengths is not None
                attended = ops.decode_from_probs(shared, v, seen.lengths)
        else:
            if places is not None:
                k, v, slots = places
                assert k is not None
                (q,) = heads_first(self.pieces.project_qkv_into(self, hidden, cos, sin, k, v, slots))
            else:
                q, k, v = heads_first(*self.pieces.project_qkv(self, hidden, cos, sin))
                if cache is not None:
                    k, v = cache.append_kv(layer_idx, k, v)
            if last is not None:
                hidden, q = hidden[:, -last:], q[:, :, -last:]
            if consumers and mode == "kv":
                produced = ops.share_kv(k, v)
                attended = _attend_kv(q, produced, seen, self.self_attn.scaling)
            else:
                attended, produced = _attend(q, k, v, seen, self.self_attn.scaling, consumers, keep)
        return self.pieces.finish(self, hidden, attended), produced


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Visibility, scale: float, consumers: int, keep: str
) -> tuple[Tensor, Any]:
    """Attention of a layer with its own Q, K and V, and its probabilities for ``consumers`` layers."""
    if seen.decoding:
        if not consumers:
            return _decode(q, k, v, seen, scale), None
        out, probs = _decode(q, k, v, seen, scale, return_probs=True)
        return out, (probs,) * consumers
    if not consumers:
        return _attend_alone(q, k, v, seen, scale), None
    return ops.attention_with_scores(q, k, v, consumers=consumers, keep=keep, scale=scale, **seen.arguments())


def _attend_alone(q: Tensor, k: Tensor, v: Tensor, seen: Visibility, scale: float) -> Tensor:
    """Attention of a layer that shares nothing, on the fastest kernels there are.

    Where a table of measurements says so that is cuDNN's through SDPA, whose gradients differ in the last bits from run to run
    (so not under :func:`torch.use_deterministic_algorithms`).
    """
    kernels = plan.kernels_of(q.device.type, q.device.index)
    if (
        plan.sdpa_is_faster(kernels, q.shape[3], q.shape[2])
        and seen.lengths is None
        and seen.first_key is None
        and q.shape[2] == k.shape[2]
        and q.dtype in (torch.bfloat16, torch.float16)
        and not torch.are_deterministic_algorithms_enabled()
    ):
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
    return ops.attention(q, k, v, scale=scale, **seen.arguments())


def _attend_kv(q: Tensor, shared: ops.SharedKV, seen: Visibility, scale: float) -> Tensor:
    """Attention to a group's K and V."""
    if seen.decoding:
        return _decode(q, shared.k, shared.v, seen, scale)
    return ops.attention_shared_kv(q, shared, scale=scale, **seen.arguments())


def _decode(q: Tensor, k: Tensor, v: Tensor, seen: Visibility, scale: float, return_probs: bool = False) -> Any:
    assert seen.lengths is not None
    return ops.decode_attention(q, k, v, seen.lengths, scale=scale, first_key=seen.first_key, return_probs=return_probs)


class KVProjection(nn.Module):
    """One more norm and K,V projection, of a layer's output (YOCO): the keys and values of all layers of a group."""

    def __init__(self, config: SharedLlamaConfig):
        super().__init__()
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        width = (config.num_key_value_heads or config.num_attention_heads) * head_dim
        bias = config.attention_bias or config.qkv_bias
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_norm = LlamaRMSNorm(head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.head_dim = head_dim

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, C] -> k and v [B, Hkv, S, D], k after RoPE."""
        x = self.norm(hidden)
        v = split_heads(self.v_proj(x), self.head_dim)
        k, v = heads_first(_keys(self, x, cos, sin).to(v.dtype), v)
        return k, v

    @torch.no_grad()
    def copy_from(self, layer: SharedDecoderLayer) -> None:
        """Begins as the first consumer's own norm and projections: then the group's first layer computes what it did."""
        attention = layer.self_attn
        pairs: list[tuple[nn.Module | None, Any]] = [
            (self.norm, layer.input_layernorm),
            (self.k_proj, attention.k_proj),
            (self.v_proj, attention.v_proj),
            (self.k_norm, attention.k_norm),
        ]
        for mine, theirs in pairs:
            if mine is None:
                continue
            if theirs is None:
                raise ValueError("effcore: the first consumer's K,V projections were dropped; there is nothing to copy")
            mine.load_state_dict(theirs.state_dict())
