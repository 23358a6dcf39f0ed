"""Fake kernels, the autograd formula and FLOP counts of the lowrank ops.

Training calls ``lowrank_linear_saving``, which returns x · downᵀ (thin) and, where the activation needs it, its argument; the
plain op keeps neither.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from effcore.ops._attach import attach, below_autograd, not_differentiable, refuse_double_backward

_ops = torch.ops.effcore
_RELU = 1


def _rows(x) -> Any:
    rows = 1
    for n in x.shape[:-1]:
        rows = rows * n
    return rows


@torch.library.register_fake("effcore::lowrank_linear")
def _(x, down, up, bias, activation):
    return x.new_empty((*x.shape[:-1], up.shape[0]))


@torch.library.register_fake("effcore::lowrank_linear_saving")
def _(x, down, up, bias, activation):
    rows = _rows(x)
    before = x.new_empty((rows, up.shape[0]) if activation > _RELU else (0,))
    return x.new_empty((*x.shape[:-1], up.shape[0])), x.new_empty((rows, down.shape[0])), before


@torch.library.register_fake("effcore::lowrank_linear_bwd")
def _(dout, x, down, up, hidden, before, activation, want_x, want_down, want_up, want_bias):
    return (
        x.new_empty(x.shape if want_x else (0,)),
        x.new_empty(down.shape if want_down else (0,)),
        x.new_empty(up.shape if want_up else (0,)),
        x.new_empty((up.shape[0],) if want_bias else (0,)),
    )


@functools.cache
def limits(device: str, dtype: torch.dtype) -> tuple[int, ...]:
    """Nine numbers for each box of shapes that the fused kernel serves (Limits in effcore/lowrank.h)."""
    return tuple(_ops.lowrank_limits.default(torch.empty(0, dtype=dtype, device=device)))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, down, up, bias, activation):
        with below_autograd():
            out, hidden, before = _ops.lowrank_linear_saving.default(x, down, up, bias, activation)
        # relu's derivative can be told from its result, which is there anyway
        ctx.save_for_backward(x, down, up, hidden, out if activation == _RELU else before)
        ctx.activation = activation
        ctx.has_bias = bias is not None
        return out

    @staticmethod
    def backward(ctx: Any, dout):
        wants = ctx.needs_input_grad[:4]
        grads = _ops.lowrank_linear_bwd.default(dout, *ctx.saved_tensors, ctx.activation, *wants)
        return *(g if want else None for g, want in zip(grads, wants, strict=True)), None


lowrank_linear = attach("lowrank_linear", _Linear.apply)
attach("lowrank_linear_saving", not_differentiable("lowrank_linear_saving"))
attach("lowrank_linear_bwd", refuse_double_backward("lowrank_linear_bwd"))


# ---------------------------------------------------------------- FLOP counts: matrix products alone, as torch counts


def _count(x_shape, down_shape, up_shape) -> int:
    rows = 1
    for n in x_shape[:-1]:
        rows *= n
    return 2 * rows * down_shape[0] * (down_shape[1] + up_shape[0])


@register_flop_formula([_ops.lowrank_linear, _ops.lowrank_linear_saving])
def _(x_shape, down_shape, up_shape, *_args, out_shape=None, **_kwargs) -> int:
    return _count(x_shape, down_shape, up_shape)


@register_flop_formula([_ops.lowrank_linear_bwd])
def _(dout_shape, x_shape, down_shape, up_shape, hidden_shape, before_shape, activation, *wants, out_shape=None, **_kw):
    want_x, want_down, want_up, _ = wants
    rows = dout_shape[:-1]
    thin, wide = _count((*rows, 0), down_shape, (0, 0)), _count((*rows, 0), (down_shape[0], 0), up_shape)
    return wide * (want_up + (want_x or want_down)) + thin * (want_x + want_down)
