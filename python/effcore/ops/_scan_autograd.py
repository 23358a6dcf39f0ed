"""Fake kernels, autograd formulas and FLOP counts of the scan ops.

The scan's forward keeps the state before each piece of tokens where a gradient is wanted; its backward recomputes the states
of a piece from there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from effcore.ops._attach import attach, below_autograd, not_differentiable, refuse_double_backward

_ops = torch.ops.effcore


def _sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def piece_tokens(device: str, states: int) -> int:
    """Tokens between two kept states: a piece's states must fit a cache (CPU) or shared memory (GPU) in the backward."""
    if device == "cpu":
        return max(8, min(64, 1024 // states))
    return 16


def _kept(x, offsets, keep):
    if keep == 0:
        return 0
    tokens = x.shape[1]
    if offsets is not None:
        return tokens // keep + offsets.shape[0] - 1
    return x.shape[0] * ((tokens + keep - 1) // keep)


# ---------------------------------------------------------------- fake kernels


@torch.library.register_fake("effcore::causal_conv1d")
def _(x, weight, bias, initial_state, offsets, silu):
    return x.new_empty(x.shape)


@torch.library.register_fake("effcore::causal_conv1d_bwd")
def _(dout, x, weight, bias, initial_state, offsets, silu):
    sums = _sums_dtype(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(weight.shape, dtype=sums),
        x.new_empty((0,) if bias is None else bias.shape, dtype=sums),
        x.new_empty((0,) if initial_state is None else initial_state.shape),
    )


@torch.library.register_fake("effcore::selective_scan")
def _(x, dt, A, B, C, D, z, dt_bias, initial_state, offsets, dt_softplus, keep):
    sums = _sums_dtype(x.dtype)
    sequences = x.shape[0] if offsets is None else offsets.shape[0] - 1
    return (
        x.new_empty(x.shape),
        x.new_empty((sequences, *A.shape), dtype=sums),
        x.new_empty((_kept(x, offsets, keep), A.shape[1], A.shape[0]), dtype=sums),
    )


@torch.library.register_fake("effcore::selective_scan_bwd")
def _(dout, dfinal, x, dt, A, B, C, D, z, dt_bias, offsets, states, dt_softplus, keep, has_initial):
    sums = _sums_dtype(x.dtype)
    sequences = x.shape[0] if offsets is None else offsets.shape[0] - 1

    def parameter(p):
        return x.new_empty((0,) if p is None else p.shape, dtype=sums)

    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
        parameter(A),
        x.new_empty(B.shape),
        x.new_empty(B.shape),
        parameter(D),
        x.new_empty((0,) if z is None else x.shape),
        parameter(dt_bias),
        x.new_empty((sequences, *A.shape) if has_initial else (0,), dtype=sums),
    )


@torch.library.register_fake("effcore::selective_step")
def _(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    return x.new_empty(x.shape), state.new_empty(state.shape)


# ---------------------------------------------------------------- autograd


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, initial_state, offsets, silu):
        with below_autograd():
            out = _ops.causal_conv1d.default(x, weight, bias, initial_state, offsets, silu)
        ctx.save_for_backward(x, weight, bias, initial_state, offsets)
        ctx.silu = silu
        return out

    @staticmethod
    def backward(ctx: Any, dout):
        x, weight, bias, initial_state, offsets = ctx.saved_tensors
        dx, dweight, dbias, dinitial = _ops.causal_conv1d_bwd.default(
            dout, x, weight, bias, initial_state, offsets, ctx.silu
        )
        return (
            dx,
            dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None if initial_state is None else dinitial,
            None,
            None,
        )


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, dt, A, B, C, D, z, dt_bias, initial_state, offsets, dt_softplus, keep):
        keep = keep or piece_tokens(x.device.type, A.shape[1])
        with below_autograd():
            out, final_state, states = _ops.selective_scan.default(
                x, dt, A, B, C, D, z, dt_bias, initial_state, offsets, dt_softplus, keep
            )
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, offsets, states)
        ctx.static = dt_softplus, keep, initial_state is not None
        ctx.mark_non_differentiable(states)
        ctx.set_materialize_grads(False)
        return out, final_state, states

    @staticmethod
    def backward(ctx: Any, dout, dfinal, _):
        x, dt, A, B, C, D, z, dt_bias, offsets, states = ctx.saved_tensors
        if dout is None:
            if dfinal is None:
                return (None,) * 12
            dout = torch.zeros_like(x)
        dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial = _ops.selective_scan_bwd.default(
            dout, dfinal, x, dt, A, B, C, D, z, dt_bias, offsets, states, *ctx.static
        )

        def like(gradient, parameter):
            return None if parameter is None else gradient.to(parameter.dtype)

        return (
            *(dx, ddt, like(dA, A), dB, dC, like(dD, D), None if z is None else dz, like(ddt_bias, dt_bias)),
            *(dinitial if ctx.static[2] else None, None, None, None),
        )


causal_conv1d = attach("causal_conv1d", _Conv.apply)
selective_scan = attach("selective_scan", _Scan.apply)
for _name in ("causal_conv1d_bwd", "selective_scan_bwd"):
    attach(_name, refuse_double_backward(_name))
selective_step = attach("selective_step", not_differentiable("selective_step"))


# ---------------------------------------------------------------- FLOP counts
# A token, channel and state costs a decay (counted as 2), a multiply-add of the state, the product dt B x and a multiply-add
# of the output: 7. The backward makes the states again and adds the gradients of dh, B, C, dt x, q and A: 18.


@register_flop_formula([_ops.causal_conv1d])
def _(x_shape, weight_shape, *_args, out_shape=None, **_kwargs) -> int:
    batch, tokens, channels = x_shape
    return 2 * batch * tokens * channels * weight_shape[1]


@register_flop_formula([_ops.causal_conv1d_bwd])
def _(dout_shape, x_shape, weight_shape, *_args, out_shape=None, **_kwargs) -> int:
    batch, tokens, channels = x_shape
    return 4 * batch * tokens * channels * weight_shape[1]


@register_flop_formula([_ops.selective_scan])
def _(x_shape, dt_shape, A_shape, *_args, out_shape=None, **_kwargs) -> int:
    batch, tokens, channels = x_shape
    return 7 * batch * tokens * channels * A_shape[1]


@register_flop_formula([_ops.selective_scan_bwd])
def _(dout_shape, dfinal_shape, x_shape, dt_shape, A_shape, *_args, out_shape=None, **_kwargs) -> int:
    batch, tokens, channels = x_shape
    return 18 * batch * tokens * channels * A_shape[1]


@register_flop_formula([_ops.selective_step])
def _(state_shape, *_args, out_shape=None, **_kwargs) -> int:
    batch, channels, states = state_shape
    return 7 * batch * channels * states
