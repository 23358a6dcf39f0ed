"""The stem of a ResNet in few passes over memory: 7×7 convolution of stride 2, batch norm, ReLU, 3×3 maximum of stride 2.

Over three channels a library's convolution takes many times its bound. Over blocks of 2×8 pixels, 48 channels, it is one of
4×2 blocks, whose 256 channels are those of four pixels side by side: the same numbers in the same place of memory. The norm,
the ReLU and the maximum, one by one, read and write the network's largest tensor eleven times in training; here they are four
kernels of Triton (:mod:`effcore.ops.norm_relu_pool`) that move less than half of it.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcore.nn.side_by_side import block_weight, blocks, pixels
from effcore.ops.norm_relu_pool import TRITON, norm_relu_pool, statistics

__all__ = ["StemConv2d", "StemNorm", "fuse_stem", "stem"]

DTYPES = (torch.bfloat16, torch.float16)
SIDE_BY_SIDE = 4  # pixels of the output


def convolve(images: Tensor, weight: Tensor) -> Tensor:
    """conv(images) of stride 2 and padding 3: [B, H/2, W/2, C]."""
    squares = F.pad(F.pixel_unshuffle(images, 2), (2, 2, 2, 1)).permute(0, 2, 3, 1).contiguous()
    of_squares = F.pixel_unshuffle(F.pad(weight, (1, 0, 1, 0)), 2)  # [C, 4 c, 4, 4]
    y = F.conv2d(blocks(squares, SIDE_BY_SIDE), block_weight(of_squares, SIDE_BY_SIDE, 2, 0))
    return pixels(y, SIDE_BY_SIDE)


def stem(images: Tensor, weight: Tensor, norm: Any) -> Tensor:
    """max_pool(relu(norm(conv(images)))): [B, c, H, W] -> [B, C, H / 4, W / 4], channels_last.

    The convolution is 7×7 of stride 2 and padding 3, the maximum 3×3 of stride 2 and padding 1. While ``norm`` is in training
    mode, statistics are the batch's, which its running ones follow. Sums are float32; among equal numbers of a window the first
    one is chosen, as by ``nn.MaxPool2d``. Differentiable, once, in weight and in the norm's weight and bias.

    Args:
        images: [B, c, H, W], H even and W a multiple of 8; bfloat16 or float16, on a GPU.
        weight: [C, c, 7, 7], C a multiple of 8, at most 64; cast to images' dtype.
        norm: a batch norm with weight, bias and running statistics, which may be float32.

    Raises:
        ValueError: naming what does not fit.
    """
    _check(images, weight, norm)
    y = convolve(images, weight.to(images.dtype)).contiguous()
    if norm.training:
        rows = y.detach().flatten(0, 2)
        mean, variance = statistics(rows)
        _follow(norm, mean, variance, len(rows))
    else:
        mean, variance = norm.running_mean.float(), norm.running_var.float()
    keep = torch.is_grad_enabled() and (y.requires_grad or norm.weight.requires_grad or norm.bias.requires_grad)
    gamma, beta = norm.weight.float(), norm.bias.float()
    out, *_ = norm_relu_pool(y, gamma, beta, mean, variance, norm.eps, norm.training, keep)
    return out.permute(0, 3, 1, 2)


def _check(images: Tensor, weight: Tensor, norm: Any) -> None:
    if not images.is_cuda or images.dtype not in DTYPES or not TRITON:
        raise ValueError(
            f"effcore.stem: images must be bfloat16 or float16 on a GPU with Triton, got {images.dtype} on {images.device}"
        )
    if images.dim() != 4 or images.shape[2] % 2 or images.shape[3] % (2 * SIDE_BY_SIDE):
        raise ValueError(
            f"effcore.stem: images must be [batch, channels, height, width], height even and width a multiple of "
            f"{2 * SIDE_BY_SIDE}, got {list(images.shape)}"
        )
    channels = weight.shape[0]
    if weight.shape != (channels, images.shape[1], 7, 7) or channels % 8 or channels > 64:
        raise ValueError(
            f"effcore.stem: weight must be [C, {images.shape[1]}, 7, 7], C a multiple of 8 and at most 64, "
            f"got {list(weight.shape)}"
        )
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(norm, name)
        if tensor is None or tensor.shape != (channels,) or tensor.device != images.device:
            got = "none" if tensor is None else f"{list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"effcore.stem: the norm's {name} must be [{channels}] on {images.device}, got {got}")


@torch.no_grad()
def _follow(norm: Any, mean: Tensor, variance: Tensor, count: int) -> None:
    """The running statistics follow those of a batch of ``count`` numbers a channel."""
    norm.num_batches_tracked.add_(1)
    part = norm.num_batches_tracked.float().reciprocal() if norm.momentum is None else norm.momentum
    norm.running_mean.add_(part * (mean - norm.running_mean))
    norm.running_var.add_(part * (variance * (count / max(count - 1, 1)) - norm.running_var))


class StemConv2d(nn.Conv2d):
    """A stem's convolution, that does what stands behind it as well: in half precision on a GPU as :func:`stem`."""

    around: tuple[nn.Module, str]  # who holds the norm, and as what

    @property
    def norm(self) -> StemNorm:
        """The norm, where it stands in the model."""
        holder, name = self.around
        norm = attrgetter(name)(holder)
        if type(norm) is not StemNorm:
            raise RuntimeError(
                f"effcore.fuse_stem: {name} is {type(norm).__name__} now, behind which ReLU and maximum are gone; replace "
                "norms (SyncBatchNorm) before the stem is fused"
            )
        return norm

    def forward(self, images: Tensor) -> Tensor:
        norm = self.norm
        if images.is_cuda and torch.is_autocast_enabled("cuda"):
            images = images.to(torch.get_autocast_dtype("cuda"))
        fits = images.shape[2] % 2 == 0 and images.shape[3] % (2 * SIDE_BY_SIDE) == 0
        if images.is_cuda and images.dtype in DTYPES and fits and TRITON:
            return stem(images, self.weight, norm)
        return F.max_pool2d(F.relu(nn.BatchNorm2d.forward(norm, super().forward(images))), 3, 2, 1)


class StemNorm(nn.BatchNorm2d):
    """The norm by which a :class:`StemConv2d` norms, under the name that it had; it gives back what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def fuse_stem(model: nn.Module) -> nn.Module:
    """Makes a ResNet's stem one module, in place; its parameters and their names stay. Returns the model.

    Hugging Face's ResNets, and those of torchvision and timm whose stem is conv1, bn1, an activation, maxpool. Where images are
    not as :func:`stem` wants them, the same is computed by torch's own functions. The norm stays a ``BatchNorm2d`` in its
    place, to be frozen or loaded; another that is put there later raises when the model is called.

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
        conv.__dict__["around"] = module, names[1]  # no children of its own: the norm has its place and its name
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
