"""The cross-shaped 3D convolution and patch embeddings, slow and obvious: the oracle of their tests. Differentiable by torch
itself."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Triple = int | tuple[int, int, int]


def triple(value: Triple) -> tuple[int, int, int]:
    return (value, value, value) if isinstance(value, int) else value


def paddings(kernel: tuple[int, ...], padding: Triple | str) -> tuple[int, ...]:
    if isinstance(padding, str):
        assert padding == "same"
        return tuple(k // 2 for k in kernel)
    return triple(padding)


def dense_kernel(spatial: Tensor, temporal: Tensor) -> Tensor:
    """[O, C, kt, kh, kw]: ``spatial`` in the middle frame, ``temporal`` in the middle pixel, their sum where they meet."""
    (kh, kw), kt = spatial.shape[2:], temporal.shape[2]
    across = F.pad(spatial[:, :, None], (0, 0, 0, 0, kt // 2, kt // 2))
    along = F.pad(temporal[..., None, None], (kw // 2, kw // 2, kh // 2, kh // 2))
    return across + along


def cross_conv3d(
    x: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Triple = 1,
    padding: Triple | str = "same",
) -> Tensor:
    """Conv3d with :func:`dense_kernel`."""
    kernel = dense_kernel(spatial, temporal)
    return F.conv3d(x, kernel, bias, triple(stride), paddings(kernel.shape[2:], padding))


def two_branches(
    x: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Triple = 1,
    padding: Triple | str = "same",
) -> Tensor:
    """The same as the sum of a spatial and a temporal convolution, each on the voxels that the other one samples too."""
    kernel = temporal.shape[2], *spatial.shape[2:]
    pads = paddings(kernel, padding)
    x = F.pad(x, [p for d in (2, 1, 0) for p in (pads[d],) * 2])
    middle = [slice(k // 2, size - k // 2) for k, size in zip(kernel, x.shape[2:], strict=True)]
    across = F.conv3d(x[:, :, middle[0]], spatial[:, :, None], bias, triple(stride))
    along = F.conv3d(x[..., middle[1], middle[2]], temporal[..., None, None], None, triple(stride))
    return across + along


def patch_embed3d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Conv3d whose stride is its kernel."""
    return F.conv3d(x, weight, bias, weight.shape[2:])
