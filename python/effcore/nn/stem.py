"""The stem of a ResNet in few passes over memory: 7×7 convolution of stride 2, batch norm, ReLU, 3×3 maximum of stride 2.

Of three channels a library's convolution reaches a tenth of its bound, and the norm, the ReLU and the maximum read and write
the largest tensor of the network eleven times in training. Here the convolution is one of 4×4 taps over squares of 2×2 pixels,
256 products for each output, which takes the norm's sums as it writes; the others are one pass forward. Backward, the norm's
sums need only what each window has chosen, and the gradient of the convolution's output is made in registers where the weight's
gradient needs it. The kernels are Triton's (:mod:`effcore.nn._stem_kernels`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from effcore.nn.batch_norm import DTYPES, BatchNorm2d, follow, triton_is_here

__all__ = ["StemConv2d", "StemNorm", "fuse_stem", "stem"]

DEPTH = 16  # channels of a square
PIXELS, WARPS = 128, 4  # of a program's product
WINDOWS = 32  # of a program's maximum
ROUNDS = 8
PROGRAMS = 264  # that add up the weight's gradient: two a multiprocessor


def squares(images: Tensor) -> Tensor:
    """Images [B, c, H, W] as squares of 2×2 pixels [B, H/2 + 3, W/2 + 3, 16], the convolution's padding around them."""
    padded = F.pad(F.pixel_unshuffle(images, 2), (2, 1, 2, 1, 0, DEPTH - 4 * images.shape[1]))
    return padded.permute(0, 2, 3, 1).contiguous()


def square_weight(weight: Tensor) -> Tensor:
    """A kernel [C, c, 7, 7] as [256, C]: of 4×4 squares, by row, column, and channel of the square."""
    taps = F.pixel_unshuffle(F.pad(weight, (1, 0, 1, 0)), 2)
    return F.pad(taps, (0, 0, 0, 0, 0, DEPTH - taps.shape[1])).permute(2, 3, 1, 0).flatten(0, 2).contiguous()


@torch.library.triton_op("effcore::stem", mutates_args=())
def _stem(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, each window's own y and its place, y, mean and variance: of the batch where none are given.

    x [B, Hs, Ws, 16], weight [256, C], out [B, H, W, C]. ``keep``: for a backward.
    """
    import triton

    from effcore.nn import _stem_kernels as kernels

    wrap = torch.library.wrap_triton
    batch, height, width, channels = x.shape[0], x.shape[1] - 3, x.shape[2] - 3, weight.shape[1]
    pixels, block_c = batch * height * width, max(16, triton.next_power_of_2(channels))
    blocks = triton.cdiv(pixels, PIXELS)
    y = x.new_empty(batch, height, width, channels)
    sums = torch.empty((blocks, 2, channels), dtype=torch.float32, device=x.device)
    wrap(kernels.stem_convolve)[(blocks,)](
        x, weight, y, sums, pixels, height, width, channels, BLOCK=PIXELS, BLOCK_C=block_c, num_warps=WARPS
    )
    if mean is None or variance is None:
        total, apart = sums.unbind(1)
        mean = total.sum(0) / pixels
        within = (pixels - PIXELS * torch.arange(blocks, device=x.device)).clamp(max=PIXELS)[:, None]
        variance = (apart + within * (total / within - mean).square()).sum(0) / pixels
    else:
        mean, variance = mean.float(), variance.float()
    scale = gamma * (variance + eps).rsqrt()
    shift = beta - mean * scale
    out = x.new_empty(batch, (height + 1) // 2, (width + 1) // 2, channels)
    kept = out.shape if keep else (0,)
    own, place = x.new_empty(kept), torch.empty(kept, dtype=torch.int8, device=x.device)
    windows = batch * ((height + 1) // 2) * ((width + 1) // 2)
    wrap(kernels.stem_pool)[(triton.cdiv(windows, WINDOWS),)](
        y, scale, shift, out, own, place, windows, height, width, channels,
        KEEP=keep, BLOCK=WINDOWS, BLOCK_C=block_c, num_warps=WARPS,
    )  # fmt: skip
    return out, own, place, y if keep else x.new_empty(0), mean.clone(), variance.clone()


@torch.library.triton_op("effcore::stem_backward", mutates_args=())
def _stem_backward(
    gradient: Tensor,
    own: Tensor,
    place: Tensor,
    y: Tensor,
    x: Tensor,
    gamma: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight [256, C], gamma and beta, in float32. ``training``: mean and variance are the batch's."""
    import triton

    from effcore.nn import _stem_kernels as kernels

    wrap = torch.library.wrap_triton
    batch, height, width, channels = y.shape
    pixels, block_c = batch * height * width, max(16, triton.next_power_of_2(channels))
    windows = batch * ((height + 1) // 2) * ((width + 1) // 2)
    gradient = gradient.contiguous()
    blocks = triton.cdiv(windows, WINDOWS * ROUNDS)
    sums = torch.empty((blocks, 2, channels), dtype=torch.float32, device=y.device)
    wrap(kernels.stem_reduce)[(blocks,)](
        gradient, own, place, mean, sums, windows, channels, BLOCK=WINDOWS, ROUNDS=ROUNDS, BLOCK_C=block_c
    )
    dbeta, apart = sums.sum(0).unbind(0)
    scale = (variance + eps).rsqrt()
    dgamma = apart * scale
    # y's gradient is a (g - mean of g - normed y · mean of (g · normed y)) with a = gamma · scale: linear in g and y.
    a = gamma * scale
    slope = -a * scale * dgamma / pixels if training else torch.zeros_like(a)
    offset = -a * dbeta / pixels - slope * mean if training else torch.zeros_like(a)
    parts = torch.empty((PROGRAMS, 16 * DEPTH, channels), dtype=torch.float32, device=y.device)
    wrap(kernels.stem_weight_gradient)[(PROGRAMS,)](
        x, y, gradient, place, a, slope, offset, parts, pixels, triton.cdiv(pixels, PROGRAMS * 64), height, width, channels,
        BLOCK=64, BLOCK_C=block_c, num_warps=8,
    )  # fmt: skip
    return parts.sum(0), dgamma, dbeta.clone()


@register_flop_formula(torch.ops.effcore.stem)
def _(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    batch, height, width, _depth = x_shape
    return 2 * batch * (height - 3) * (width - 3) * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.effcore.stem_backward)
def _(
    gradient_shape: Any, own_shape: Any, place_shape: Any, y_shape: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return 2 * math.prod(y_shape) * 16 * DEPTH


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, gamma, _, given, _, eps, _ = inputs
    _, own, place, y, mean, variance = output
    ctx.mark_non_differentiable(own, place, y, mean, variance)
    ctx.save_for_backward(own, place, y, x, gamma, mean, variance)
    ctx.eps, ctx.training = eps, given is None


def _gradients(ctx: Any, gradient: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    own, place, y, x, gamma, mean, variance = ctx.saved_tensors
    dweight, dgamma, dbeta = _stem_backward(gradient, own, place, y, x, gamma, mean, variance, ctx.eps, ctx.training)
    return None, dweight.to(x.dtype), dgamma, dbeta, None, None, None, None


_stem.register_autograd(_gradients, setup_context=_setup)


def stem(images: Tensor, weight: Tensor, norm: Any) -> Tensor:
    """max_pool(relu(norm(conv(images)))): [B, c, H, W] -> [B, C, H / 4, W / 4], channels_last.

    The convolution is 7×7 of stride 2 and padding 3, the maximum 3×3 of stride 2 and padding 1. While ``norm`` is in training
    mode, statistics are the batch's, which its running ones follow. Sums are float32; among equal numbers of a window the first
    one is chosen, as by ``nn.MaxPool2d``. Differentiable, once, in weight and in the norm's weight and bias, not in the images.

    Args:
        images: [B, c, H, W], c at most 4, H and W even; bfloat16 or float16, on a GPU.
        weight: [C, c, 7, 7], C a multiple of 8, at most 64; cast to images' dtype.
        norm: a batch norm with weight, bias and running statistics, which may be float32.
    """
    mean, variance = (None, None) if norm.training else (norm.running_mean, norm.running_var)
    keep = torch.is_grad_enabled() and any(p.requires_grad for p in (weight, norm.weight, norm.bias))
    x, taps = squares(images.detach()), square_weight(weight.to(images.dtype))
    out, *_, mean, variance = _stem(x, taps, norm.weight.float(), norm.bias.float(), mean, variance, norm.eps, keep)
    if norm.training:
        follow(norm, mean, variance, x.shape[0] * (x.shape[1] - 3) * (x.shape[2] - 3))
    return out.permute(0, 3, 1, 2)


class StemConv2d(nn.Conv2d):
    """A stem's convolution, that does what stands behind it as well: in half precision on a GPU as :func:`stem`."""

    norm: StemNorm

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_autocast_enabled(images.device.type):
            images = images.to(torch.get_autocast_dtype(images.device.type))
        if (
            images.is_cuda
            and images.dtype in DTYPES
            and not images.requires_grad
            and triton_is_here()
            and _even(images)
        ):
            return stem(images, self.weight, self.norm)
        n, y = self.norm, super().forward(images)
        return F.max_pool2d(F.relu(nn.BatchNorm2d.forward(n, y)), 3, 2, 1)  # type: ignore[arg-type]


class StemNorm(nn.Module):
    """Holds what a :class:`StemConv2d` norms with, under the names that it had, and gives back what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    _check_input_dim = nn.BatchNorm2d._check_input_dim


def _even(images: Tensor) -> bool:
    return images.shape[-1] % 2 == 0 and images.shape[-2] % 2 == 0


def fuse_stem(model: nn.Module) -> nn.Module:
    """Makes a ResNet's stem one module, in place; its parameters and their names stay. Returns the model.

    Hugging Face's ResNets, and those of torchvision and timm whose stem is conv1, bn1, an activation, maxpool. Where images are
    not as :func:`stem` wants them, the same is computed by torch's own functions.

    Raises:
        ValueError: there is no such stem: a 7×7 convolution of stride 2 without a bias over at most 4 channels, a batch norm
            with parameters and running statistics, ReLU, a 3×3 maximum of stride 2.
    """
    for module in model.modules():
        names = next((n for n in STEMS if all(_at(module, name) is not None for name in n)), None)
        if names is None:
            continue
        conv, norm, activation, pool = (_at(module, name) for name in names)
        if why := _unlike(conv, norm, activation, pool):
            raise ValueError(f"effcore.fuse_stem: {why}")
        conv.__class__, norm.__class__ = StemConv2d, StemNorm
        conv.__dict__["norm"] = norm  # not a child: it has its place and its name
        for name in names[2:]:
            place, _, last = name.rpartition(".")
            setattr(module.get_submodule(place), last, nn.Identity())
        return model
    raise ValueError(
        "effcore.fuse_stem: the model has no stem of a convolution, a batch norm, an activation and a pool"
    )


# Names of the four modules from the one that holds them: Hugging Face, torchvision, timm.
STEMS = (
    ("embedder.convolution", "embedder.normalization", "embedder.activation", "pooler"),
    ("conv1", "bn1", "relu", "maxpool"),
    ("conv1", "bn1", "act1", "maxpool"),
)


def _at(module: nn.Module, name: str) -> Any:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _unlike(conv: Any, norm: Any, activation: Any, pool: Any) -> str:
    """What is not as :func:`stem` has it, or nothing."""
    wanted = {"kernel_size": (7, 7), "stride": (2, 2), "padding": (3, 3), "dilation": (1, 1), "groups": 1, "bias": None}
    if type(conv) is not nn.Conv2d or any(getattr(conv, n) != w for n, w in wanted.items()) or conv.in_channels > 4:
        return (
            f"the convolution must be 7x7, of stride 2 and padding 3, of at most 4 channels, without a bias, got {conv}"
        )
    if conv.out_channels > 64 or conv.out_channels % 8:
        return f"the convolution must have a multiple of 8 channels, at most 64, got {conv.out_channels}"
    if type(norm) not in (nn.BatchNorm2d, BatchNorm2d) or not (norm.affine and norm.track_running_stats):
        return f"the norm must be a BatchNorm2d with parameters and running statistics, got {norm}"
    if not isinstance(activation, nn.ReLU):
        return f"the activation must be ReLU, got {activation}"
    pair = lambda value: value if isinstance(value, tuple) else (value, value)  # noqa: E731
    shape = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": False, "return_indices": False}
    if not isinstance(pool, nn.MaxPool2d) or any(pair(getattr(pool, n)) != pair(w) for n, w in shape.items()):
        return f"the pool must be a maximum of 3x3, stride 2 and padding 1, got {pool}"
    return ""
