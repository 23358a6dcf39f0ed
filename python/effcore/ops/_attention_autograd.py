"""Fake kernels, autograd formulas and FLOP counts of the attention ops.

How a group's gradient travels without a side channel: the owner op returns, for each consumer, slots (stride-0 tensors
that hold nothing) with the shapes of the consumer's output and values, and one float32 slot for delta. A consumer takes
them as inputs and returns dO, V and rowsum(dO * O) as their *cotangents*. Autograd adds the deltas and calls the owner's
backward once, after every consumer's.

Shared keys and values: each layer takes the slots of the one before and returns float32 slots of its own, so that the sums of
dK and dV go from the last layer's backward to the first's, each of which adds its own in its kernel (autograd's additions
would read and write them three times a layer). The first layer's slots have the dtype of K and V: its kernel rounds the sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effcore.ops._attach import attach, below_autograd, not_differentiable, refuse_double_backward

KEEP_LSE, KEEP_PROBS = 0, 1
PROBS_TILE = 64
DECODE_CHUNK = 256

_ops = torch.ops.effcore


def probs_elements(queries: int, keys: int, causal: bool) -> int:
    """Elements of one head's kept probabilities: tiles of 64 x 64, without those that causality hides, and two for each row,
    the room of a float32 factor.

    Block of rows r sees clamp(r + 1 + shift, 0, columns) tiles, shift = ceil((keys - queries) / 64): an arithmetic series,
    written in closed form so that symbolic shapes go through.
    """
    rows, columns = -(-queries // PROBS_TILE), -(-keys // PROBS_TILE)
    if not causal:
        return rows * columns * PROBS_TILE**2 + 2 * queries
    shift = -((queries - keys) // PROBS_TILE)
    last, before = (
        rows + shift,
        (shift + abs(shift)) // 2,
    )  # max(shift, 0), which Dynamo of 2.10 takes in this form alone
    return ((last * (last + 1) - before * (before + 1)) // 2 - (last - columns)) * PROBS_TILE**2 + 2 * queries


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _heads(like: Tensor, batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised [B, H, S, D] tensor in the memory order of ``like``, as the native ops allocate it."""
    dtype = like.dtype if dtype is None else dtype
    if like.stride(1) < like.stride(2):
        return like.new_empty((batch, tokens, heads, dim), dtype=dtype).transpose(1, 2)
    return like.new_empty((batch, heads, tokens, dim), dtype=dtype)


def _like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The gradient of ``t``."""
    batch, heads, tokens, dim = t.shape
    return _heads(t, batch, heads, tokens, dim, dtype)


def _slot(device_of: Tensor, sizes: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(sizes, (0,) * len(sizes), dtype=dtype, device=device_of.device)


# ---------------------------------------------------------------- fake kernels


@torch.library.register_fake("effcore::attention")
def _(q, k, v, lengths, first_key, causal, scale):
    batch, heads, queries, _ = q.shape
    lse = q.new_empty((batch, heads, queries), dtype=_statistics_dtype(q.dtype))
    return _heads(q, batch, heads, queries, v.shape[3]), lse


@torch.library.register_fake("effcore::attention_bwd")
def _(dout, q, k, v, out, lse, lengths, first_key, causal, scale, accumulate_kv, dk_sum=None, dv_sum=None):
    kv_dtype = _statistics_dtype(q.dtype) if accumulate_kv else q.dtype
    return _like(q), _like(k, kv_dtype), _like(v, kv_dtype)


@torch.library.register_fake("effcore::attention_with_scores")
def _(q, k, v, lengths, first_key, causal, scale, consumers, keep):
    batch, heads, queries, _ = q.shape
    statistics = _statistics_dtype(q.dtype)
    out = _heads(q, batch, heads, queries, v.shape[3])
    lse = q.new_empty((batch, heads, queries), dtype=statistics)
    probs = q.new_empty((batch, heads, probs_elements(queries, k.shape[2], causal)) if keep == KEEP_PROBS else (0,))
    return (
        out,
        lse,
        probs,
        _slot(q, lse.shape, statistics),
        [_slot(q, out.shape, q.dtype) for _ in range(consumers)],
        [_slot(q, v.shape, q.dtype) for _ in range(consumers)],
        [_slot(q, torch.Size(()), torch.float32) for _ in range(consumers)],
    )


@torch.library.register_fake("effcore::attention_with_scores_bwd")
def _(q, k, out, lse, probs, delta, douts, values, uses, lengths, first_key, causal, scale):
    return _like(q), _like(k), _like(values[0])


@torch.library.register_fake("effcore::attention_from_scores")
def _(q, k, v, lse, probs, delta, dout_slot, value_slot, use, lengths, first_key, causal, scale):
    batch, heads, queries, _ = q.shape
    return _heads(q, batch, heads, queries, v.shape[3])


@torch.library.register_fake("effcore::attention_from_scores_bwd")
def _(dout, out, q, k, v, lse, probs, lengths, first_key, causal, scale):
    return _like(v), torch.empty_like(lse, memory_format=torch.contiguous_format)


@torch.library.register_fake("effcore::share_kv")
def _(k, v):
    return _slot(k, k.shape, k.dtype), _slot(k, v.shape, k.dtype)


@torch.library.register_fake("effcore::attention_shared_kv")
def _(q, k, v, k_slot, v_slot, lengths, first_key, causal, scale):
    batch, heads, queries, _ = q.shape
    statistics = _statistics_dtype(q.dtype)
    lse = q.new_empty((batch, heads, queries), dtype=statistics)
    slots = (_slot(k, t.shape, statistics) for t in (k_slot, v_slot))
    return _heads(q, batch, heads, queries, v.shape[3]), lse, *slots


@torch.library.register_fake("effcore::decode_attention")
def _(q, k, v, lengths, first_key, scale, return_probs):
    batch, heads, queries, _ = q.shape
    keys, statistics = k.shape[2], _statistics_dtype(q.dtype)
    weights = q.new_empty((batch, heads, keys) if return_probs else (0,))
    scales = q.new_empty((batch, heads, -(-keys // DECODE_CHUNK)) if return_probs else (0,), dtype=statistics)
    return _heads(q, batch, heads, queries, v.shape[3]), weights, scales


@torch.library.register_fake("effcore::decode_from_probs")
def _(weights, scales, v, lengths, first_key):
    return weights.new_empty((*weights.shape[:2], 1, v.shape[3]))


# ---------------------------------------------------------------- autograd


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, lengths, first_key, causal, scale):
        with below_autograd():
            out, lse = _ops.attention.default(q, k, v, lengths, first_key, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse, lengths, first_key)
        ctx.static = causal, scale
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout, _dlse):
        if dout is None:
            return (None,) * 7
        q, k, v, out, lse, lengths, first_key = ctx.saved_tensors
        grads = _ops.attention_bwd.default(dout, q, k, v, out, lse, lengths, first_key, *ctx.static, False)
        return *grads, None, None, None, None


class _AttentionWithScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, lengths, first_key, causal, scale, consumers, keep):
        with below_autograd():
            out, lse, probs, delta, douts, values, uses = _ops.attention_with_scores.default(
                q, k, v, lengths, first_key, causal, scale, consumers, keep
            )
        ctx.save_for_backward(q, k, v, out, lse, probs, lengths, first_key)
        ctx.static, ctx.consumers = (causal, scale), consumers
        ctx.mark_non_differentiable(lse, probs)
        ctx.set_materialize_grads(False)
        return out, lse, probs, delta, *douts, *values, *uses

    @staticmethod
    def backward(ctx: Any, dout, _dlse, _dprobs, delta, *slots):
        q, k, v, out, lse, probs, lengths, first_key = ctx.saved_tensors
        n = ctx.consumers
        used = [i for i in range(n) if slots[i] is not None]
        if dout is None and not used:
            return (None,) * 9
        douts = [torch.zeros_like(out) if dout is None else dout, *(slots[i] for i in used)]
        values = [v, *(slots[n + i] for i in used)]
        uses = [slots[2 * n + i] for i in used]
        grads = _ops.attention_with_scores_bwd.default(
            q, k, out, lse, probs, delta, douts, values, uses, lengths, first_key, *ctx.static
        )
        return *grads, None, None, None, None, None, None


class _AttentionFromScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, lse, probs, delta, dout_slot, value_slot, use, lengths, first_key, causal, scale):
        with below_autograd():
            out = _ops.attention_from_scores.default(
                q, k, v, lse, probs, delta, dout_slot, value_slot, use, lengths, first_key, causal, scale
            )
        ctx.save_for_backward(q, k, v, out, lse, probs, use, lengths, first_key)
        ctx.static = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout):
        q, k, v, out, lse, probs, use, lengths, first_key = ctx.saved_tensors
        dv, delta = _ops.attention_from_scores_bwd.default(
            dout, out, q, k, v, lse, probs, lengths, first_key, *ctx.static
        )
        return None, None, dv, None, None, delta, dout, v, torch.ones_like(use), None, None, None, None


class _ShareKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k, v):
        with below_autograd():
            slots = _ops.share_kv.default(k, v)
        ctx.set_materialize_grads(False)
        return slots

    @staticmethod
    def backward(ctx: Any, dk, dv):
        return dk, dv


class _AttentionSharedKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, k_slot, v_slot, lengths, first_key, causal, scale):
        with below_autograd():
            out, lse, k_next, v_next = _ops.attention_shared_kv.default(
                q, k, v, k_slot, v_slot, lengths, first_key, causal, scale
            )
        ctx.save_for_backward(q, k, v, out, lse, lengths, first_key)
        ctx.static, ctx.sums_dtype = (causal, scale), k_slot.dtype
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse, k_next, v_next

    @staticmethod
    def backward(ctx: Any, dout, _dlse, dk_sum, dv_sum):
        if dout is None:
            sums = (None if t is None else t.to(ctx.sums_dtype) for t in (dk_sum, dv_sum))
            return None, None, None, *sums, None, None, None, None
        q, k, v, out, lse, lengths, first_key = ctx.saved_tensors
        dq, dk, dv = _ops.attention_bwd.default(
            dout, q, k, v, out, lse, lengths, first_key, *ctx.static, ctx.sums_dtype != k.dtype, dk_sum, dv_sum
        )
        return dq, None, None, dk, dv, None, None, None, None


def _apply_with_scores(*arguments):
    consumers = arguments[7]
    out, lse, probs, delta, *slots = _AttentionWithScores.apply(*arguments)
    return out, lse, probs, delta, slots[:consumers], slots[consumers : 2 * consumers], slots[2 * consumers :]


attention = attach("attention", _Attention.apply)
attention_with_scores = attach("attention_with_scores", _apply_with_scores)
attention_from_scores = attach("attention_from_scores", _AttentionFromScores.apply)
share_kv = attach("share_kv", _ShareKV.apply)
attention_shared_kv = attach("attention_shared_kv", _AttentionSharedKV.apply)
for _name in ("attention_bwd", "attention_with_scores_bwd", "attention_from_scores_bwd"):
    attach(_name, refuse_double_backward(_name))
decode_attention = attach("decode_attention", not_differentiable("decode_attention"))
decode_from_probs = attach("decode_from_probs", not_differentiable("decode_from_probs"))


# ---------------------------------------------------------------- FLOP counts
# As torch counts its own attention: matrix products alone, without a discount for causality.


def _product(q_shape, keys: int, dim: int) -> int:
    batch, heads, queries = q_shape[:3]
    return 2 * batch * heads * queries * keys * dim


@register_flop_formula([_ops.attention, _ops.attention_shared_kv, _ops.attention_with_scores, _ops.decode_attention])
def _(q_shape, k_shape, v_shape, *_args, out_shape=None, **_kwargs) -> int:
    return _product(q_shape, k_shape[2], q_shape[3] + v_shape[3])


@register_flop_formula(_ops.attention_bwd)
def _(dout_shape, q_shape, k_shape, v_shape, *_args, out_shape=None, **_kwargs) -> int:
    return _product(q_shape, k_shape[2], 3 * q_shape[3] + 2 * v_shape[3])


@register_flop_formula(_ops.attention_from_scores)
def _(q_shape, k_shape, v_shape, lse_shape, probs_shape, *_args, out_shape=None, **_kwargs) -> int:
    recompute = 0 if len(probs_shape) == 3 else q_shape[3]
    return _product(q_shape, k_shape[2], recompute + v_shape[3])


@register_flop_formula(_ops.attention_from_scores_bwd)
def _(
    dout_shape, out_dims, q_shape, k_shape, v_shape, lse_shape, probs_shape, *_args, out_shape=None, **_kwargs
) -> int:
    recompute = 0 if len(probs_shape) == 3 else q_shape[3]
    return _product(q_shape, k_shape[2], recompute + v_shape[3])


@register_flop_formula(_ops.attention_with_scores_bwd)
def _(
    q_shape, k_shape, out_dims, lse_shape, probs_shape, delta, douts, values, *_args, out_shape=None, **_kwargs
) -> int:
    recompute = 0 if len(probs_shape) == 3 else q_shape[3]
    return _product(q_shape, k_shape[2], recompute + 2 * q_shape[3] + (len(values) + 1) * out_dims[3])


@register_flop_formula(_ops.decode_from_probs)
def _(weights_shape, scales_shape, v_shape, *_args, out_shape=None, **_kwargs) -> int:
    batch, heads, keys = weights_shape
    return 2 * batch * heads * keys * v_shape[3]
