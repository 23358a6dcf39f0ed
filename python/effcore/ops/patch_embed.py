"""Conv3d whose stride is its kernel, without padding (the patch embedding of video transformers), as one matrix product.

On Hopper in bfloat16 and float16 the product reads the patches where they lie in the clip; elsewhere they are gathered first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effcore.ops._attach import attach, below_autograd

__all__ = ["patch_embed3d"]

_ops = torch.ops.effcore

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def patch_embed3d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``torch.nn.functional.conv3d(x, weight, bias, stride=weight.shape[2:])``.

    .. math:: y_{o,p} = b_o + \sum_{c,i,j,l} W_{o,c,i,j,l}\, x_{c,\, p \circ (k_t, k_h, k_w) + (i, j, l)}

    Args:
        x: [B, C, T, H, W], at least one patch large; float32, bfloat16, float16 or float64. Voxels that fill no patch at the
            far ends are left out.
        weight: [O, C, kt, kh, kw], of x's dtype.
        bias: [O], of x's dtype.

    Returns:
        [B, O, T // kt, H // kh, W // kw] in channels_last_3d: ``.flatten(2).transpose(1, 2)`` are tokens, without a copy.
        Under ``torch.autocast`` the tensors are cast to its dtype. Differentiable (once, where the clip is read in place).

    Raises:
        ValueError: naming the argument, what was expected and what came (groups, a clip smaller than a patch).
    """
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if _reads_in_place(x, weight):
        return _in_place(x, weight, bias)  # which checks them in the core
    _check(x, weight, bias)
    return _gathered(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """As check_patches in cpp/src/conv3d_check.cpp, which sees only clips that are read in place: others, and shapes without
    data (meta), are products of torch's."""
    f, voxels = "effcore.patch_embed3d", "frames, height, width]"
    if x.dtype not in DTYPES:
        raise ValueError(f"{f}: x is {_name(x.dtype)} but {', '.join(map(_name, DTYPES))} are supported")
    if x.dim() != 5:
        raise ValueError(f"{f}: x must have 5 dimensions [batch, channels, {voxels} but has shape {list(x.shape)}")
    if weight.dim() != 5:
        raise ValueError(
            f"{f}: weight must have shape [out_channels, in_channels, {voxels} but has {list(weight.shape)}"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise ValueError(f"{f}: {name} is {_name(t.dtype)} but must be {_name(x.dtype)} as the others are")
        if t is not None and t.device != x.device:
            raise ValueError(f"{f}: {name} is on {t.device} but the others are on {x.device}")
    if min(weight.shape) < 1:
        raise ValueError(f"{f}: weight must not be empty but has shape {list(weight.shape)}")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{f}: weight has {weight.shape[1]} input channels but x has {x.shape[1]} (groups are not supported)"
        )
    if any(n < k for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)):
        raise ValueError(f"{f}: x of shape {list(x.shape)} holds no patch of weight's shape {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{f}: bias must have shape [{len(weight)}] but has {list(bias.shape)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- where the patches lie


def _reads_in_place(x: Tensor, weight: Tensor) -> bool:
    """Whether Hopper's copy engine takes lines of patches out of x: they are a multiple of 16 voxels long and begin at
    multiples of 16 bytes (cuda/conv3d/hopper/patches.cuh)."""
    return (
        x.is_cuda
        and x.dim() == weight.dim() == 5
        and x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.shape[-1] % 16 == 0
        and weight.shape[0] % 8 == 0
        # Offsets cannot be traced; the op copies what is whole but begins elsewhere.
        and (torch.compiler.is_compiling() or x.storage_offset() % 8 == 0)
        and (_is_whole(x) or (not torch.compiler.is_compiling() and _strides_serve(x, weight)))
        and _has_kernel(x.dtype)
    )


def _is_whole(x: Tensor) -> bool:
    return x.is_contiguous() and x.shape[-1] % 8 == 0 and x.stride(0) < 2**31


def _strides_serve(x: Tensor, weight: Tensor) -> bool:
    strides = x.stride()
    # From the first voxel of four neighbouring patches to their last: coordinates of the copy engine are 32 bits wide.
    span = sum((n - 1) * stride for n, stride in zip((x.shape[1], *weight.shape[2:]), strides[1:], strict=True))
    return (
        strides[-1] == 1
        and min(strides) > 0
        and all(n % 8 == 0 for n in strides[:-1])
        and span + 3 * weight.shape[-1] < 2**31
    )


@torch.compiler.assume_constant_result
def _has_kernel(dtype: torch.dtype) -> bool:
    return _path(dtype, torch.cuda.current_device()) == "wgmma sm_90a"


@functools.cache
def _path(dtype: torch.dtype, _device: int) -> str:
    from effcore import _cuda

    return _cuda.path("conv3d", str(dtype).removeprefix("torch."))


@torch.library.register_fake("effcore::patch_embed3d")
def _(x, weight, bias):
    size = [n // k for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)]
    return x.new_empty((x.shape[0], *size, weight.shape[0])).movedim(-1, 1)


class _PatchEmbed3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias):
        with below_autograd():
            out = _ops.patch_embed3d.default(x, weight, bias)
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout):
        x, weight = ctx.saved_tensors
        wants, dx, dweight, dbias = ctx.needs_input_grad, None, None, None
        rows = dout.movedim(1, -1).flatten(0, -2)
        if wants[0]:
            patches = (rows @ weight.flatten(1)).view(dout.shape[0], *dout.shape[2:], weight[0].numel())
            dx = _scatter(patches, x, weight.shape[2:])
        if wants[1]:
            dweight = (rows.t() @ _gather(x, weight.shape[2:]).flatten(0, -2)).view_as(weight)
        if wants[2]:
            dbias = rows.sum(0)
        return dx, dweight, dbias


_in_place = attach("patch_embed3d", _PatchEmbed3d.apply)


@register_flop_formula(_ops.patch_embed3d)
def _(x_shape, weight_shape, *_args, out_shape=None, **_kwargs) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight_shape[1:])


# ---------------------------------------------------------------- gathered first


def _gathered(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(_gather(x, weight.shape[2:]), weight.flatten(1), bias).movedim(-1, 1)


@torch.library.impl("effcore::patch_embed3d", "CPU")
def _(x, weight, bias):
    _check(x, weight, bias)
    return _gathered(x, weight, bias)


def _gather(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """[B, t, h, w, C · kt · kh · kw], each patch in a weight's order."""
    kt, kh, kw = kernel
    words = x.view(torch.int64) if _moves_words(x, kw) else x
    t, h, w = (n // k for n, k in zip(x.shape[2:], kernel, strict=True))
    size = words.shape[-1] * kw // x.shape[-1]  # of a patch's line
    words = words[:, :, : t * kt, : h * kh, : w * size].reshape(*x.shape[:2], t, kt, h, kh, w, size)
    patches = words.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(x.shape[0], t, h, w, x.shape[1] * kt * kh * size)
    # A view as another dtype has no gradient, not even as the same one.
    return patches if patches.dtype == x.dtype else patches.view(x.dtype)


def _scatter(patches: Tensor, x: Tensor, kernel: Sequence[int]) -> Tensor:
    """The gradient of what ``_gather`` does."""
    batch, t, h, w, _ = patches.shape
    voxels = patches.view(batch, t, h, w, x.shape[1], *kernel).permute(0, 4, 1, 5, 2, 6, 3, 7)
    dx = voxels.reshape(batch, x.shape[1], *(n * k for n, k in zip((t, h, w), kernel, strict=True)))
    margins = [n - m for n, m in zip(x.shape[2:], dx.shape[2:], strict=True)]
    return F.pad(dx, [p for n in reversed(margins) for p in (0, n)]) if any(margins) else dx


def _moves_words(x: Tensor, width: int) -> bool:
    """Whether patches can be gathered 8 bytes at a time, three times as fast as elements of 2 bytes: their lines begin and
    end at whole words, and no gradient flows to the voxels, which have no view of another size then."""
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()) or x.stride(-1) != 1:
        return False
    places = width, x.shape[-1], x.storage_offset(), *x.stride()[:-1]
    return x.element_size() < 8 and all(n * x.element_size() % 8 == 0 for n in places)
