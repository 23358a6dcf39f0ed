"""Fake kernels, autograd formulas and FLOP counts of the routing ops.

Moving tokens is linear: the gradient of a separation is a merge, that of a merge a separation, so both directions move each
token once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from effcore.ops._attach import attach, below_autograd, no_gradient, not_differentiable, refuse_double_backward

_ops = torch.ops.effcore


def _sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------- fake kernels


@torch.library.register_fake("effcore::partition_tokens")
def _(scores, keep, protect):
    batch, tokens = scores.shape
    return (
        scores.new_empty((batch, keep), dtype=torch.int32),
        scores.new_empty((batch, tokens - keep), dtype=torch.int32),
    )


@torch.library.register_fake("effcore::class_scores")
def _(q, k, scale):
    return q.new_empty((k.shape[0], k.shape[2]), dtype=_sums_dtype(q.dtype))


@torch.library.register_fake("effcore::score_partition")
def _(q, k, keep, protect, scale):
    batch, tokens = k.shape[0], k.shape[2]
    return q.new_empty((batch, keep), dtype=torch.int32), q.new_empty((batch, tokens - keep), dtype=torch.int32)


@torch.library.register_fake("effcore::gather_tokens")
def _(x, index):
    return x.new_empty((x.shape[0], index.shape[1], x.shape[2]))


@torch.library.register_fake("effcore::gather_tokens_bwd")
def _(dout, index, tokens):
    return dout.new_empty((dout.shape[0], tokens, dout.shape[2]))


@torch.library.register_fake("effcore::separate_tokens")
def _(x, index_a, index_b):
    return tuple(x.new_empty((x.shape[0], index.shape[1], x.shape[2])) for index in (index_a, index_b))


@torch.library.register_fake("effcore::merge_tokens")
def _(a, index_a, b, index_b, residual, residual_a):
    return a.new_empty((a.shape[0], a.shape[1] + b.shape[1], a.shape[2]))


@torch.library.register_fake("effcore::gather_norm")
def _(x, index, weight, bias, eps, rms):
    statistics = _sums_dtype(x.dtype)
    shape = (x.shape[0], index.shape[1], x.shape[2])
    mean = x.new_empty((0,) if rms else shape[:2], dtype=statistics)
    return x.new_empty(shape), x.new_empty(shape), mean, x.new_empty(shape[:2], dtype=statistics)


@torch.library.register_fake("effcore::gather_norm_bwd")
def _(dtokens, dnormed, tokens, index, weight, mean, rstd, total, rms, has_bias):
    batch, _, channels = tokens.shape
    sums = _sums_dtype(tokens.dtype)
    return (
        tokens.new_empty((batch, total, channels)),
        tokens.new_empty((channels,), dtype=sums),
        tokens.new_empty((channels if has_bias else 0,), dtype=sums),
    )


# ---------------------------------------------------------------- autograd


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, index):
        with below_autograd():
            out = _ops.gather_tokens.default(x, index)
        ctx.save_for_backward(index)
        ctx.tokens = x.shape[1]
        return out

    @staticmethod
    def backward(ctx: Any, dout):
        (index,) = ctx.saved_tensors
        return _ops.gather_tokens_bwd.default(dout, index, ctx.tokens), None


class _Separate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, index_a, index_b):
        with below_autograd():
            a, b = _ops.separate_tokens.default(x, index_a, index_b)
        ctx.save_for_backward(index_a, index_b)
        ctx.tokens = x.shape[1]
        ctx.set_materialize_grads(False)
        return a, b

    @staticmethod
    def backward(ctx: Any, da, db):
        index_a, index_b = ctx.saved_tensors
        if da is None and db is None:
            return None, None, None
        if da is None or db is None:  # only one of the lists was used: the other tokens get zeros
            grad, index = (db, index_b) if da is None else (da, index_a)
            return _ops.gather_tokens_bwd.default(grad, index, ctx.tokens), None, None
        return _ops.merge_tokens.default(da, index_a, db, index_b, None, None), None, None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a, index_a, b, index_b, residual, residual_a):
        with below_autograd():
            out = _ops.merge_tokens.default(a, index_a, b, index_b, residual, residual_a)
        ctx.save_for_backward(index_a, index_b)
        return out

    @staticmethod
    def backward(ctx: Any, dout):
        index_a, index_b = ctx.saved_tensors
        wants_a, wants_b = ctx.needs_input_grad[0] or ctx.needs_input_grad[5], ctx.needs_input_grad[2]
        da = db = None
        if wants_a and wants_b:
            da, db = _ops.separate_tokens.default(dout, index_a, index_b)
        elif wants_a:
            da = _ops.gather_tokens.default(_dense_rows(dout), index_a)
        elif wants_b:
            db = _ops.gather_tokens.default(_dense_rows(dout), index_b)
        wants = ctx.needs_input_grad
        return da if wants[0] else None, None, db, None, dout if wants[4] else None, da if wants[5] else None


def _dense_rows(t):
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


class _GatherNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, index, weight, bias, eps, rms):
        with below_autograd():
            tokens, normed, mean, rstd = _ops.gather_norm.default(x, index, weight, bias, eps, rms)
        ctx.save_for_backward(tokens, index, weight, mean, rstd)
        ctx.static = x.shape[1], rms, bias is not None
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return tokens, normed, mean, rstd

    @staticmethod
    def backward(ctx: Any, dtokens, dnormed, *_):
        tokens, index, weight, mean, rstd = ctx.saved_tensors
        if dnormed is None:
            if dtokens is None:
                return (None,) * 6
            return _ops.gather_tokens_bwd.default(dtokens, index, ctx.static[0]), None, None, None, None, None
        dx, dweight, dbias = _ops.gather_norm_bwd.default(
            dtokens, dnormed, tokens, index, weight, mean, rstd, *ctx.static
        )
        return (
            dx,
            None,
            dweight.to(weight.dtype),
            None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
            None,
            None,
        )


def _in_order(x, order):
    """``x[order]``: an index to a compiler, which moves it into what reads the rows; a kernel otherwise."""
    if torch.compiler.is_compiling():
        return x.index_select(0, order)
    return gather_tokens(_dense_rows(x)[None], order[None])[0]


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, order, inverse, sizes):
        ctx.save_for_backward(inverse)
        if torch.compiler.is_compiling():  # part by part: each moves into the readers of its own
            return tuple(_in_order(x, part) for part in order.split(sizes))
        return _in_order(x, order).split(sizes)

    @staticmethod
    def backward(ctx: Any, *grads):
        (inverse,) = ctx.saved_tensors
        whole = grads[0] if len(grads) == 1 else torch.cat(grads)
        return _in_order(whole, inverse), None, None, None


permute_tokens = _Permute.apply
gather_tokens = attach("gather_tokens", _Gather.apply)
separate_tokens = attach("separate_tokens", _Separate.apply)
merge_tokens = attach("merge_tokens", _Merge.apply)
gather_norm = attach("gather_norm", _GatherNorm.apply)
for _name in ("gather_tokens_bwd", "gather_norm_bwd"):
    attach(_name, refuse_double_backward(_name))
partition_tokens = attach("partition_tokens", no_gradient("partition_tokens"))
score_partition = attach("score_partition", no_gradient("score_partition"))
class_scores = attach("class_scores", not_differentiable("class_scores"))


# ---------------------------------------------------------------- FLOP counts
# As torch counts: matrix products alone. Moving tokens is free, and is counted as such rather than left out.


@register_flop_formula([_ops.class_scores, _ops.score_partition])
def _(q_shape, k_shape, *_args, out_shape=None, **_kwargs) -> int:
    batch, heads, _, dim = q_shape
    return 2 * batch * heads * k_shape[2] * dim


@register_flop_formula(
    [
        _ops.partition_tokens,
        _ops.gather_tokens,
        _ops.gather_tokens_bwd,
        _ops.separate_tokens,
        _ops.merge_tokens,
        _ops.gather_norm,
        _ops.gather_norm_bwd,
    ]
)
def _(*_args, out_shape=None, **_kwargs) -> int:
    return 0
