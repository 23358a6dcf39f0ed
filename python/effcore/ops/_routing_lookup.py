"""A skip's two movements as row lookups, which a compiler fuses with what stands around them.

A native op is a wall to ``torch.compile``: what comes before it is written out, moved, and read again. Here each row of a
result, and of a gradient, is looked up where it lies:

    leave    tokens[b, i] = x[b, kept[b, i]]            dx[b, n] = dtokens[b, place[b, n]], or 0 where n left
    rejoin   out[b, n] = tokens[b, place[b, n]], or x[b, n] where n left

``place`` [B, N] is the inverse of a partition: n's position among the kept tokens, or, if it left, ``keep`` or more. So the
lookups become loads of the residual additions and norms beside them, tokens that leave are not moved at all, and nothing is
scattered, in either direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def places(kept: Tensor, rest: Tensor) -> Tensor:
    """The inverse of a partition: [B, N] int32."""
    order = torch.cat([kept, rest], 1)
    positions = torch.arange(order.shape[1], dtype=torch.int32, device=order.device)
    return torch.empty_like(order).scatter_(1, order.long(), positions.expand_as(order))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.long()[..., None].expand(-1, -1, x.shape[2]))


def _placed(tokens: Tensor, place: Tensor, otherwise: Tensor) -> Tensor:
    keep = tokens.shape[1]
    return torch.where((place < keep)[..., None], _rows(tokens, place.clamp(max=keep - 1)), otherwise)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, kept, place):
        ctx.save_for_backward(place)
        return _rows(x, kept)

    @staticmethod
    def backward(ctx: Any, dtokens):
        (place,) = ctx.saved_tensors
        return _placed(dtokens, place, dtokens.new_zeros(())), None, None


class _Rejoin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens, x, kept, place):
        ctx.save_for_backward(kept, place)
        return _placed(tokens, place, x)

    @staticmethod
    def backward(ctx: Any, dout):
        kept, place = ctx.saved_tensors
        left = place >= kept.shape[1]
        return _rows(dout, kept), torch.where(left[..., None], dout, 0.0), None, None


def leave(x: Tensor, kept: Tensor, place: Tensor) -> Tensor:
    """The kept rows of ``x`` [B, N, C]: [B, keep, C]."""
    return _Leave.apply(x, kept, place)  # type: ignore[no-any-return]


def rejoin(tokens: Tensor, x: Tensor, kept: Tensor, place: Tensor) -> Tensor:
    """``x`` with ``tokens`` in the places of its kept rows: [B, N, C] in the dtype of ``tokens``."""
    return _Rejoin.apply(tokens, x.to(tokens.dtype), kept, place)  # type: ignore[no-any-return]
