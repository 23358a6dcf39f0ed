r"""3D convolution whose kernel is a cross: a spatial kernel in the middle frame and a temporal one in the middle pixel.

It is the sum of a 2D convolution over each frame and a 1D convolution over time ("parallel Add"), in one pass: kh·kw + kt − 1
taps instead of kt·kh·kw, 11 instead of 27, and no intermediate tensor.

Tensors are float32, bfloat16 or float16 (float64 on the CPU as well), all of one dtype; sums are in float32 or better. The fast
layout is channels_last_3d (also a slice of its channels); any other is copied into it. The result is in channels_last_3d and
the same bits in every run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from effcore.ops import _conv3d_autograd as _autograd

__all__ = ["cross_conv3d"]

_told = False


def cross_conv3d(
    x: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = "same",
) -> Tensor:
    r"""Convolution over ``x`` with a cross-shaped kernel.

    .. math:: y_{o,p} = b_o + \sum_{c,i,j} S_{o,c,i,j}\, x_{c,\,q+(\lfloor k_t/2\rfloor, i, j)}
        + \sum_{c,l} M_{o,c,l}\, x_{c,\,q+(l, \lfloor k_h/2\rfloor, \lfloor k_w/2\rfloor)}, \qquad q = s\,p - \text{padding}

    which is ``torch.nn.functional.conv3d`` with the dense kernel that is zero off the cross, at any stride: both branches
    sample the same pixels.

    Args:
        x: [B, C, T, H, W].
        spatial: [O, C, kh, kw], odd sizes.
        temporal: [O, C, kt], odd.
        bias: [O].
        stride: one number or (t, h, w).
        padding: zeros on each side, one number or (t, h, w); "same" is half the kernel, (kt // 2, kh // 2, kw // 2), at any
            stride.

    Returns:
        [B, O, T', H', W'] in channels_last_3d, T' = (T + 2 padding − kt) // stride + 1. Differentiable once in the tensors.
        Under ``torch.autocast`` the tensors are cast to its dtype, as those of ``torch.nn.functional.conv3d`` are.

    Raises:
        ValueError: naming the argument, what was expected and what came (even kernels, kernels larger than the padded
            input, groups).
    """
    _tell_layout(x)
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, spatial, temporal = x.to(dtype), spatial.to(dtype), temporal.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if padding == "same":
        padding = [temporal.shape[-1] // 2, spatial.shape[-2] // 2, spatial.shape[-1] // 2]
    return _autograd.cross_conv3d(x, spatial, temporal, bias, _triple("stride", stride), _triple("padding", padding))


def _triple(name: str, value: int | Sequence[int] | str) -> list[int]:
    if isinstance(value, int):
        return [value] * 3
    if isinstance(value, str) or len(value) != 3:
        raise ValueError(f"effcore.cross_conv3d: {name} must be an int or 3 of them (t, h, w), got {value!r}")
    return list(value)


def _tell_layout(x: Tensor) -> None:
    global _told
    if torch.compiler.is_compiling() or _told or x.dim() != 5 or x.shape[1] <= 1 or x.stride(1) == 1:
        return
    _told = True
    warnings.warn(
        "effcore.cross_conv3d: x is not in channels_last_3d and is copied in each call; "
        "x.to(memory_format=torch.channels_last_3d) at the model's entrance avoids it (told once)",
        stacklevel=3,
    )
