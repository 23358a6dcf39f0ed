"""A skip's two movements as row lookups, which a compiler fuses with what stands around them. Without gradients.

A native op is a wall to ``torch.compile``: what comes before it is written out, moved, and read again. Here each row is looked
up where it lies, inside the kernels of the residual additions and norms, and the tokens that leave are not moved at all:

    leave    tokens[b, i] = x[b, kept[b, i]]
    rejoin   out[b, n] = tokens[b, place[b, n]], or x[b, n] where n left

With gradients the native ops are as fast: their backward is a movement again, and what it would fuse with is kept anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor


def leave(x: Tensor, kept: Tensor) -> Tensor:
    """The kept rows of ``x`` [B, N, C]: [B, keep, C]."""
    return x.gather(1, kept.long()[..., None].expand(-1, -1, x.shape[2]))


def rejoin(tokens: Tensor, x: Tensor, kept: Tensor, rest: Tensor) -> Tensor:
    """``x`` with ``tokens`` in the places of its kept rows: [B, N, C] in the dtype of ``tokens``."""
    keep = kept.shape[1]
    order = torch.cat([kept, rest], 1)
    positions = torch.arange(order.shape[1], dtype=torch.int32, device=order.device)
    place = torch.empty_like(order).scatter_(
        1, order.long(), positions.expand_as(order)
    )  # the inverse of the partition
    return torch.where((place < keep)[..., None], leave(tokens, place.clamp(max=keep - 1)), x.to(tokens.dtype))
