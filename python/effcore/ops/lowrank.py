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
from torch.compiler import is_compiling

from effcore.ops import _lowrank_autograd as _autograd
from effcore.reference.lowrank import activate

__all__ = ["ACTIVATIONS", "lowrank_linear"]

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What the boxes of shapes that a kernel serves have in common, to tell in short that none fits: the least and the most rows,
# the least numbers of both factors; and the boxes. By dtype, on CUDA and elsewhere.
_Limits = tuple[int, int, int, tuple[tuple[int, ...], ...]]
_LIMITS: dict[bool, dict[torch.dtype, _Limits]] = {False: {}, True: {}}
_EVERYTHING: _Limits = (0, 1 << 62, 0, ((0, 1 << 62, 0, *(0, 1 << 62) * 3),))  # for the op to refuse
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
    if activation not in _CODES:
        raise ValueError(
            f"effcore.lowrank_linear: activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}"
        )
    if not is_compiling():
        # Beyond what a kernel serves, the op would make the same two products; torch's own entry points cost less a call. The
        # choice is made for each call of a layer, so it looks at little, and stands here. Compiled code keeps the op, whose
        # choice at run time takes no guard on the number of rows.
        least_rows, most_rows, least_numbers, boxes = _LIMITS[x.is_cuda].get(x.dtype) or _limits(x)
        try:
            numbers, features = x.numel(), x.shape[-1]
            if features and (
                not least_rows * features <= numbers <= most_rows * features
                or down.numel() + up.numel() < least_numbers
                or not _within(boxes, x, down, up)
            ):
                out = F.linear(F.linear(x, down), up, bias)
                return out if activation is None else activate(out, activation)
        except (IndexError, RuntimeError):
            pass  # a bad argument: the op refuses it by name
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, down, up = x.to(dtype), down.to(dtype), up.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _autograd.lowrank_linear(x, down, up, bias, _CODES[activation])


def stays_on_chip(x: Tensor, down: Tensor, up: Tensor) -> bool:
    """Whether :func:`lowrank_linear` of these is one kernel of a GPU, with x · downᵀ never in memory."""
    if not x.is_cuda or not x.dtype == down.dtype == up.dtype or x.dtype not in _DTYPES:
        return False
    return _within(_boxes(True, x.dtype), x, down, up)


def _limits(x: Tensor) -> _Limits:
    if x.dtype not in _DTYPES or not (x.is_cpu or x.is_cuda):
        return _EVERYTHING
    boxes = _boxes(x.is_cuda, x.dtype)
    least_rows, most_rows = min((b[0] for b in boxes), default=1), max((b[1] for b in boxes), default=0)
    least_numbers = min((b[2] for b in boxes), default=0)
    return _LIMITS[x.is_cuda].setdefault(x.dtype, (least_rows, most_rows, least_numbers, boxes))


def _within(boxes: tuple[tuple[int, ...], ...], x: Tensor, down: Tensor, up: Tensor) -> bool:
    features = x.shape[-1]
    rows, rank, out, numbers = x.numel() // features, down.shape[0], up.shape[0], down.numel() + up.numel()
    for least_rows, most_rows, least_numbers, least_rank, most_rank, least_in, most_in, least_out, most_out in boxes:
        if (
            least_rows <= rows <= most_rows
            and numbers >= least_numbers
            and least_rank <= rank <= most_rank
            and least_in <= features <= most_in
            and least_out <= out <= most_out
        ):
            return True
    return False


@torch.compiler.assume_constant_result
def _boxes(cuda: bool, dtype: torch.dtype) -> tuple[tuple[int, ...], ...]:
    """Boxes of shapes (effcore/lowrank.h), with the factors' least bytes as numbers."""
    item = torch.empty(0, dtype=dtype).itemsize
    flat = _autograd.limits("cuda" if cuda else "cpu", dtype)
    return tuple((*flat[i : i + 2], flat[i + 2] // item, *flat[i + 3 : i + 9]) for i in range(0, len(flat), 9))
