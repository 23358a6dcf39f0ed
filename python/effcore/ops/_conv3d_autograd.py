"""Fake kernels, autograd formula and FLOP counts of the cross-shaped 3D convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from effcore.ops._attach import attach, below_autograd, refuse_double_backward

_ops = torch.ops.effcore


def _voxels(like, sizes):
    return torch.empty(sizes, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


# ---------------------------------------------------------------- fake kernels


@torch.library.register_fake("effcore::cross_conv3d")
def _(x, spatial, temporal, bias, stride, padding):
    kernel = temporal.shape[2], *spatial.shape[2:]
    size = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True)]
    return _voxels(x, (x.shape[0], spatial.shape[0], *size))


@torch.library.register_fake("effcore::cross_conv3d_bwd_data")
def _(dout, spatial, temporal, stride, padding, frames, height, width):
    return _voxels(dout, (dout.shape[0], spatial.shape[1], frames, height, width))


@torch.library.register_fake("effcore::cross_conv3d_bwd_weight")
def _(x, dout, kernel, stride, padding, channels_inside=False):
    def like_kernel(*taps):
        outputs, channels = dout.shape[1], x.shape[1]
        if channels_inside:
            return x.new_empty((outputs, *taps, channels)).movedim(-1, 1)
        return x.new_empty((outputs, channels, *taps))

    return like_kernel(kernel[1], kernel[2]), like_kernel(kernel[0])


# ---------------------------------------------------------------- autograd


class _CrossConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, spatial, temporal, bias, stride, padding):
        with below_autograd():
            out = _ops.cross_conv3d.default(x, spatial, temporal, bias, stride, padding)
        ctx.save_for_backward(x, spatial, temporal)
        ctx.static = stride, padding
        return out

    @staticmethod
    def backward(ctx: Any, dout):
        x, spatial, temporal = ctx.saved_tensors
        wants, (stride, padding) = ctx.needs_input_grad, ctx.static
        dx = dspatial = dtemporal = dbias = None
        if wants[0]:
            dx = _ops.cross_conv3d_bwd_data.default(dout, spatial, temporal, stride, padding, *x.shape[2:])
        if wants[1] or wants[2]:
            kernel = [temporal.shape[2], *spatial.shape[2:]]
            # The gradients lie like the kernels: channels outside of the taps, or inside (channels_last_3d).
            shown_by = (
                spatial if spatial.shape[2] * spatial.shape[3] > 1 else temporal
            )  # of one tap the strides say nothing
            inside = shown_by.shape[1] > 1 and shown_by.stride(1) == 1
            dspatial, dtemporal = _ops.cross_conv3d_bwd_weight.default(x, dout, kernel, stride, padding, inside)
        if wants[3]:
            dbias = dout.sum((0, 2, 3, 4))
        return dx, dspatial if wants[1] else None, dtemporal if wants[2] else None, dbias, None, None


cross_conv3d = attach("cross_conv3d", _CrossConv3d.apply)
for _name in ("cross_conv3d_bwd_data", "cross_conv3d_bwd_weight"):
    attach(_name, refuse_double_backward(_name))


# ---------------------------------------------------------------- FLOP counts
# As torch counts a convolution: taps beyond the border as well.


def _flops(out_shape, channels, kernel) -> int:
    taps = kernel[0] - 1 + kernel[1] * kernel[2]
    positions = out_shape[0] * out_shape[2] * out_shape[3] * out_shape[4]
    return 2 * positions * taps * out_shape[1] * channels


@register_flop_formula(_ops.cross_conv3d)
def _(x_shape, spatial_shape, temporal_shape, *_args, out_shape=None, **_kwargs) -> int:
    return _flops(out_shape, x_shape[1], (temporal_shape[2], *spatial_shape[2:]))


@register_flop_formula(_ops.cross_conv3d_bwd_data)
def _(dout_shape, spatial_shape, temporal_shape, *_args, out_shape=None, **_kwargs) -> int:
    return _flops(dout_shape, spatial_shape[1], (temporal_shape[2], *spatial_shape[2:]))


@register_flop_formula(_ops.cross_conv3d_bwd_weight)
def _(x_shape, dout_shape, kernel, *_args, out_shape=None, **_kwargs) -> int:
    return _flops(dout_shape, x_shape[1], kernel)
