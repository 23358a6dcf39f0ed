"""Batch norm whose statistics are read at the rate of a copy.

torch.compile's own reductions of channels_last images read them at about half of a copy's rate. Here one Triton kernel sums
them up; what is done with the statistics is plain torch, which torch.compile fuses with what stands around it.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BatchNorm2d", "batch_statistics", "faster_norms"]

DTYPES = (torch.bfloat16, torch.float16)
BLOCK, BLOCK_C, WARPS = 32, 64, 4
PROGRAMS = 1056  # eight a multiprocessor


@torch.library.triton_op("effcore::batch_statistics", mutates_args=())
def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (of all, not of all but one) of each channel, in float32.

    Args:
        x: [rows, C], contiguous; bfloat16 or float16, on a GPU.
    """
    import triton

    from effcore.nn import _batch_norm_kernels as kernels

    rows, channels = x.shape
    columns = triton.cdiv(channels, BLOCK_C)
    programs = min(max(PROGRAMS // columns, 1), triton.cdiv(rows, BLOCK))
    sums = torch.empty((programs, 2, channels), dtype=torch.float32, device=x.device)
    torch.library.wrap_triton(kernels.batch_sums)[(programs, columns)](
        x, sums, rows, triton.cdiv(rows, programs * BLOCK), channels, BLOCK=BLOCK, BLOCK_C=BLOCK_C, num_warps=WARPS
    )
    mean, square = (sums.sum(0) / rows).unbind(0)
    return x[0] + mean, (square - mean.square()).clamp(min=0.0)


def _gradient(ctx: Any, dmean: Tensor, dvariance: Tensor) -> Tensor:
    x, mean = ctx.saved_tensors
    return ((dmean + 2 * dvariance * (x - mean)) / len(x)).to(x.dtype)


def _setup(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])


batch_statistics.register_autograd(_gradient, setup_context=_setup)


@torch.no_grad()
def follow(norm: Any, mean: Tensor, variance: Tensor, count: int) -> None:
    """The running statistics of a batch norm follow those of a batch of ``count`` numbers a channel."""
    norm.num_batches_tracked.add_(1)
    part = norm.num_batches_tracked.float().reciprocal() if norm.momentum is None else norm.momentum
    norm.running_mean.add_(part * (mean - norm.running_mean))
    norm.running_var.add_(part * (variance * (count / max(count - 1, 1)) - norm.running_var))


@functools.cache
def triton_is_here() -> bool:
    return importlib.util.find_spec("triton") is not None


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d``; in training, of channels_last images in half precision on a GPU, with :func:`batch_statistics`."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and x.is_cuda and x.dtype in DTYPES and triton_is_here()):
            return super().forward(x)
        if not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)
        mean, variance = batch_statistics(rows)
        if self.track_running_stats:
            follow(self, mean, variance, len(rows))
        scale = (variance + self.eps).rsqrt()
        out = (x - mean[:, None, None]) * (scale if self.weight is None else scale * self.weight)[:, None, None]
        return (out if self.bias is None else out + self.bias[:, None, None]).to(x.dtype)


def faster_norms(model: nn.Module) -> nn.Module:
    """Makes every ``nn.BatchNorm2d`` of a model a :class:`BatchNorm2d`, in place; what it holds stays. Returns the model."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm2d
    return model
