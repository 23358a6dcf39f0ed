"""A batch norm, a ReLU and the maximum of 3×3 windows, as formulas in plain torch. Differentiable by torch itself."""

import torch
import torch.nn.functional as F
from torch import Tensor


def statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (of all, not of all but one) of each channel of y [rows, C]."""
    mean = rows.mean(0)
    return mean, (rows - mean).square().mean(0)


def norm_relu_pool(
    y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float, training: bool
) -> Tensor:
    """max over windows of relu(gamma · (y - mean) / sqrt(variance + eps) + beta): [B, ceil(H / 2), ceil(W / 2), C].

    ``y`` is [B, H, W, C]; windows are 3×3, of stride 2 and padding 1. ``training``: mean and variance are those of y, and y's
    gradient goes through them.
    """
    if training:
        mean, variance = statistics(y.flatten(0, 2))
    normed = torch.relu((y - mean) * (variance + eps).rsqrt() * gamma + beta)
    padded = F.pad(normed, (0, 0, 1, 1, 1, 1))  # a zero changes no maximum of numbers that are not negative
    windows = padded.unfold(1, 3, 2).unfold(2, 3, 2)  # [B, ceil(H / 2), ceil(W / 2), C, 3, 3]
    return windows.flatten(-2).max(-1).values
