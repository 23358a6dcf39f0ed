"""A linear layer whose weight is a product of two thin matrices.

    W ≈ up · down,   down [r, I],  up [O, r]:   out = f(x · downᵀ · upᵀ + bias)

2·r·(I + O) operations a row instead of 2·I·O (Denton et al. 2014; Zhang et al. 2015; the ranks of arXiv 2407.20266). For few
rows on the CPU, and for small ranks on CUDA, one kernel does both products and the intermediate x · downᵀ stays on the chip;
elsewhere they are two products of torch's. Which one it is depends on shapes and dtype alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcore.ops import _lowrank_autograd as _autograd

__all__ = ["ACTIVATIONS", "lowrank_linear"]

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def lowrank_linear(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """``f(x · downᵀ · upᵀ + bias)``. Differentiable (once) in x, down, up and bias.

    Args:
        x: [..., I], any strides. float32, bfloat16 or float16 (float64 on the CPU as well).
        down: [r, I] in x's dtype, rows contiguous.
        up: [O, r], likewise.
        bias: [O], or None.
        activation: None, "relu", "gelu" (x Φ(x)), "gelu_tanh" (its approximation) or "silu".

    Returns:
        [..., O] in x's dtype, contiguous. Sums are float32 or better, and two calls give the same bits. Under
        ``torch.autocast`` the arguments are cast as those of ``torch.nn.functional.linear`` are.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    code = _CODES.get(activation)
    if code is None:
        raise ValueError(
            f"effcore.lowrank_linear: activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}"
        )
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, down, up = x.to(dtype), down.to(dtype), up.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _autograd.lowrank_linear(x, down, up, bias, code)
