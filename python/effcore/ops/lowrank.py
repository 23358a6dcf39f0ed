"""A linear layer whose weight is a product of two thin matrices.

    W ≈ up · down,   down [r, I],  up [O, r]:   out = f(x · downᵀ · upᵀ + bias)

2·r·(I + O) operations a row instead of 2·I·O (Denton et al. 2014; Zhang et al. 2015; the ranks of arXiv 2407.20266). For few
rows on the CPU, and for small ranks on CUDA, one kernel does both products and the intermediate x · downᵀ stays on the chip;
elsewhere they are two products of torch's. Which one it is depends on shapes and dtype alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effcore.ops import _lowrank_autograd as _autograd
from effcore.reference.lowrank import activate

__all__ = ["ACTIVATIONS", "lowrank_linear"]

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def lowrank_linear(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """``f(x · downᵀ · upᵀ + bias)``. Differentiable (once) in x, down, up and bias.

    Args:
        x: [..., I], any strides. float32, bfloat16 or float16 (float64 on the CPU as well).
        down: [r, I] in x's dtype.
        up: [O, r], likewise. A matrix that is strided in its last dimension is copied first.
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
    if not torch.compiler.is_compiling() and not _fused(x, down, up, bias):
        # The op would make the same two products; torch's own entry points cost less a call. Compiled code keeps the op, whose
        # choice at run time takes no guard on the number of rows.
        return activate(F.linear(F.linear(x, down), up, bias), activation)
    return _autograd.lowrank_linear(x, down, up, bias, code)


def _fused(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> bool:
    """Whether the fused kernel takes this problem; true as well for arguments that it is to refuse by name."""
    if not (x.dtype == down.dtype == up.dtype and x.device == down.device == up.device and down.dim() == up.dim() == 2):
        return True
    (rank, features), (out, up_rank) = down.shape, up.shape
    if x.dim() == 0 or x.shape[-1] != features or rank != up_rank or x.device.type not in ("cpu", "cuda"):
        return True
    if bias is not None and (bias.shape != (out,) or bias.dtype != x.dtype or bias.device != x.device):
        return True
    if not x.dtype.is_floating_point or not features:
        return True
    least_rows, most_rows, least_bytes, most_rank = _autograd.limits(x.device.type, x.dtype)
    rows, size = x.numel() // features, rank * (features + out) * x.itemsize
    return least_rows <= rows <= most_rows and size >= least_bytes and rank <= most_rank
