"""The stem of a ResNet in few passes over memory: 7×7 convolution of stride 2, batch norm, ReLU, 3×3 maximum of stride 2.

Over three channels a library's convolution takes many times its bound. Over blocks of 2×8 pixels, 48 channels, it is one of
4×2 blocks, whose 256 channels are those of four pixels side by side: the same numbers in the same place of memory. The norm,
the ReLU and the maximum, one by one, read and write the network's largest tensor eleven times in training; here they are four
kernels of Triton (:mod:`effcore.nn._stem_kernels`) that move less than half of it.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcore.nn.side_by_side import block_weight, blocks, pixels

__all__ = ["StemConv2d", "StemNorm", "fuse_stem", "stem"]

DTYPES = (torch.bfloat16, torch.float16)
TRITON = importlib.util.find_spec("triton") is not None
SIDE_BY_SIDE = 4  # pixels of the output
ROWS, PROGRAMS = 64, 1056  # of the statistics: eight programs a multiprocessor
WINDOWS, SUMS, SQUARES = 16, 64, 16  # of a block: of the maximum, of the norm's sums, of y's gradient
ROUNDS = 8


def convolve(images: Tensor, weight: Tensor) -> Tensor:
    """conv(images) of stride 2 and padding 3: [B, H/2, W/2, C]."""
    squares = F.pad(F.pixel_unshuffle(images, 2), (2, 2, 2, 1)).permute(0, 2, 3, 1).contiguous()
    of_squares = F.pixel_unshuffle(F.pad(weight, (1, 0, 1, 0)), 2)  # [C, 4 c, 4, 4]
    y = F.conv2d(blocks(squares, SIDE_BY_SIDE), block_weight(of_squares, SIDE_BY_SIDE, 2, 0))
    return pixels(y, SIDE_BY_SIDE)


@torch.library.triton_op("effcore::stem_statistics", mutates_args=())
def _statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (of all, not of all but one) of each channel of y [rows, C], in float32; no gradient."""
    import triton

    from effcore.nn import _stem_kernels as kernels

    count, channels = rows.shape
    programs = min(PROGRAMS, triton.cdiv(count, ROWS))
    sums = torch.empty((programs, 2, channels), dtype=torch.float32, device=rows.device)
    torch.library.wrap_triton(kernels.stem_sums)[(programs,)](
        rows, sums, count, triton.cdiv(count, programs * ROWS), channels,
        BLOCK=ROWS, BLOCK_C=triton.next_power_of_2(channels), num_warps=4,
    )  # fmt: skip
    mean, square = (sums.sum(0) / count).unbind(0)
    return rows[0] + mean, (square - mean.square()).clamp(min=0.0)


@torch.library.triton_op("effcore::norm_relu_pool", mutates_args=())
def _norm_relu_pool(
    y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float, training: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, ceil(H / 2), ceil(W / 2), C], each window's own y and its place of y [B, H, W, C], all contiguous.

    ``training``: mean and variance are y's own, and y's gradient goes through them; ``keep``: there will be a backward.
    """
    import triton

    from effcore.nn import _stem_kernels as kernels

    batch, height, width, channels = y.shape
    scale = gamma * (variance + eps).rsqrt()
    shift = beta - mean * scale
    shape = (batch, (height + 1) // 2, (width + 1) // 2, channels)
    out, windows = y.new_empty(shape), batch * shape[1] * shape[2]
    own = y.new_empty(shape if keep else (0,))
    place = torch.empty(own.shape, dtype=torch.int8, device=y.device)
    torch.library.wrap_triton(kernels.stem_pool)[(triton.cdiv(windows, WINDOWS),)](
        y, scale, shift, out, own, place, windows, height, width, channels,
        KEEP=keep, BLOCK=WINDOWS, BLOCK_C=triton.next_power_of_2(channels), num_warps=4,
    )  # fmt: skip
    return out, own, place


@torch.library.triton_op("effcore::norm_relu_pool_backward", mutates_args=())
def _norm_relu_pool_backward(
    gradient: Tensor,
    own: Tensor,
    place: Tensor,
    y: Tensor,
    gamma: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, gamma and beta."""
    import triton

    from effcore.nn import _stem_kernels as kernels

    batch, height, width, channels = y.shape
    windows, block_c = batch * ((height + 1) // 2) * ((width + 1) // 2), triton.next_power_of_2(channels)
    gradient = gradient.contiguous()
    programs = triton.cdiv(windows, SUMS * ROUNDS)
    sums = torch.empty((programs, 2, channels), dtype=torch.float32, device=y.device)
    wrap = torch.library.wrap_triton
    wrap(kernels.stem_reduce)[(programs,)](
        gradient, own, place, mean, sums, windows, channels, BLOCK=SUMS, ROUNDS=ROUNDS, BLOCK_C=block_c, num_warps=8
    )
    dbeta, apart = sums.sum(0).unbind(0)
    invstd = (variance + eps).rsqrt()
    dgamma = apart * invstd
    # y's gradient is scale · (g - mean of g - normed y · mean of (g · normed y)): linear in g and y.
    scale, pixels = gamma * invstd, batch * height * width
    slope = -scale * invstd * dgamma / pixels if training else torch.zeros_like(scale)
    offset = -scale * dbeta / pixels - slope * mean if training else torch.zeros_like(scale)
    dy = torch.empty_like(y)
    wrap(kernels.stem_spread)[(triton.cdiv(windows, SQUARES),)](
        gradient, place, y, dy, scale, slope, offset, windows, height, width, channels,
        BLOCK=SQUARES, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return dy, dgamma, dbeta.clone()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, gamma, _, mean, variance, ctx.eps, ctx.training, _ = inputs
    _, own, place = output
    ctx.mark_non_differentiable(own, place)
    ctx.save_for_backward(own, place, y, gamma, mean, variance)


def _gradients(ctx: Any, gradient: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    dy, dgamma, dbeta = _norm_relu_pool_backward(gradient, *ctx.saved_tensors, ctx.eps, ctx.training)
    return dy, dgamma, dbeta, None, None, None, None, None


_norm_relu_pool.register_autograd(_gradients, setup_context=_setup)


def stem(images: Tensor, weight: Tensor, norm: Any) -> Tensor:
    """max_pool(relu(norm(conv(images)))): [B, c, H, W] -> [B, C, H / 4, W / 4], channels_last.

    The convolution is 7×7 of stride 2 and padding 3, the maximum 3×3 of stride 2 and padding 1. While ``norm`` is in training
    mode, statistics are the batch's, which its running ones follow. Sums are float32; among equal numbers of a window the first
    one is chosen, as by ``nn.MaxPool2d``. Differentiable, once, in weight and in the norm's weight and bias.

    Args:
        images: [B, c, H, W], H even and W a multiple of 8; bfloat16 or float16, on a GPU.
        weight: [C, c, 7, 7], C a multiple of 8, at most 64; cast to images' dtype.
        norm: a batch norm with weight, bias and running statistics, which may be float32.
    """
    y = convolve(images, weight.to(images.dtype)).contiguous()
    if norm.training:
        rows = y.detach().flatten(0, 2)
        mean, variance = _statistics(rows)
        _follow(norm, mean, variance, len(rows))
    else:
        mean, variance = norm.running_mean.float(), norm.running_var.float()
    keep = torch.is_grad_enabled() and (y.requires_grad or norm.weight.requires_grad or norm.bias.requires_grad)
    gamma, beta = norm.weight.float(), norm.bias.float()
    out, *_ = _norm_relu_pool(y, gamma, beta, mean, variance, norm.eps, norm.training, keep)
    return out.permute(0, 3, 1, 2)


@torch.no_grad()
def _follow(norm: Any, mean: Tensor, variance: Tensor, count: int) -> None:
    """The running statistics follow those of a batch of ``count`` numbers a channel."""
    norm.num_batches_tracked.add_(1)
    part = norm.num_batches_tracked.float().reciprocal() if norm.momentum is None else norm.momentum
    norm.running_mean.add_(part * (mean - norm.running_mean))
    norm.running_var.add_(part * (variance * (count / max(count - 1, 1)) - norm.running_var))


class StemConv2d(nn.Conv2d):
    """A stem's convolution, that does what stands behind it as well: in half precision on a GPU as :func:`stem`."""

    norm: StemNorm

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_autocast_enabled(images.device.type):
            images = images.to(torch.get_autocast_dtype(images.device.type))
        fits = images.shape[2] % 2 == 0 and images.shape[3] % (2 * SIDE_BY_SIDE) == 0
        if images.is_cuda and images.dtype in DTYPES and fits and TRITON:
            return stem(images, self.weight, self.norm)
        n, y = self.norm, super().forward(images)
        return F.max_pool2d(F.relu(nn.BatchNorm2d.forward(n, y)), 3, 2, 1)  # type: ignore[arg-type]


class StemNorm(nn.Module):
    """Holds what a :class:`StemConv2d` norms with, under the names that it had, and gives back what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    _check_input_dim = nn.BatchNorm2d._check_input_dim


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
    if type(norm) is not nn.BatchNorm2d or not (norm.affine and norm.track_running_stats):
        return f"the norm must be a BatchNorm2d with parameters and running statistics, got {norm}"
    if not isinstance(activation, nn.ReLU):
        return f"the activation must be ReLU, got {activation}"
    pair = lambda value: value if isinstance(value, tuple) else (value, value)  # noqa: E731
    shape = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": False, "return_indices": False}
    if not isinstance(pool, nn.MaxPool2d) or any(pair(getattr(pool, n)) != pair(w) for n, w in shape.items()):
        return f"the pool must be a maximum of 3x3, stride 2 and padding 1, got {pool}"
    return ""
