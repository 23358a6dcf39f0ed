"""Fake kernels and FLOP counts of the kronecker ops. None of them is differentiable: they gather curvature."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from effcore.ops._attach import attach, not_differentiable

_ops = torch.ops.effcore


@torch.library.register_fake("effcore::grouped_gram")
def _(x, offsets, alpha):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((offsets.shape[0] - 1, x.shape[1], x.shape[1]), dtype=dtype)


@torch.library.register_fake("effcore::grouped_gram_")
def _(out, x, offsets, alpha, beta):
    pass


grouped_gram = attach("grouped_gram", not_differentiable("grouped_gram"))
grouped_gram_ = attach("grouped_gram_", not_differentiable("grouped_gram"))


# As torch counts a product of the same result, but for the half that symmetry saves: T tokens into D (D + 1) / 2 elements.
@register_flop_formula([_ops.grouped_gram])
def _(x_shape, *_args, out_shape=None, **_kwargs) -> int:
    tokens, dim = x_shape
    return tokens * dim * (dim + 1)


@register_flop_formula([_ops.grouped_gram_])
def _(_out_shape, x_shape, *_args, out_shape=None, **_kwargs) -> int:
    tokens, dim = x_shape
    return tokens * dim * (dim + 1)
