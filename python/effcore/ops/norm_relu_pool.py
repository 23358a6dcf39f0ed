"""max_pool(relu(norm(y))), 3×3 of stride 2, and its gradients in four passes over memory, on a GPU.

Kernels of Triton (:mod:`effcore.ops._norm_relu_pool_kernels`), which PyTorch's CUDA packages bring, and which ``torch.compile``
takes into its graphs. Where Triton is missing there are no such ops.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TRITON = importlib.util.find_spec("triton") is not None
ROWS, PROGRAMS = 64, 1056  # of the statistics: eight programs a multiprocessor
WINDOWS, SUMS, SQUARES = 16, 64, 16  # of a block: of the maximum, of the norm's sums, of y's gradient
ROUNDS = 8


def _op(name: str) -> Callable[[Any], Any]:
    return torch.library.triton_op(f"effcore::{name}", mutates_args=()) if TRITON else lambda function: function


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(x.device) if torch.cuda.is_available() else contextlib.nullcontext()


@_op("stem_statistics")
def statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (of all, not of all but one) of each channel of y [rows, C], in float32; no gradient."""
    import triton

    from effcore.ops import _norm_relu_pool_kernels as kernels

    count, channels = rows.shape
    programs = min(PROGRAMS, triton.cdiv(count, ROWS))
    sums = torch.empty((programs, 2, channels), dtype=torch.float32, device=rows.device)
    with _on(rows):
        torch.library.wrap_triton(kernels.stem_sums)[(programs,)](
            rows, sums, count, triton.cdiv(count, programs * ROWS), channels,
            BLOCK=ROWS, BLOCK_C=triton.next_power_of_2(channels), num_warps=4,
        )  # fmt: skip
    mean, square = (sums.sum(0) / count).unbind(0)
    return rows[0] + mean, (square - mean.square()).clamp(min=0.0)


@_op("norm_relu_pool")
def norm_relu_pool(
    y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float, training: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, ceil(H / 2), ceil(W / 2), C], each window's own y and its place of y [B, H, W, C], all contiguous.

    ``training``: mean and variance are y's own, and y's gradient goes through them; ``keep``: there will be a backward.
    """
    import triton

    from effcore.ops import _norm_relu_pool_kernels as kernels

    batch, height, width, channels = y.shape
    scale = gamma * (variance + eps).rsqrt()
    shift = beta - mean * scale
    shape = (batch, (height + 1) // 2, (width + 1) // 2, channels)
    out, windows = y.new_empty(shape), batch * shape[1] * shape[2]
    own = y.new_empty(shape if keep else (0,))
    place = torch.empty(own.shape, dtype=torch.int8, device=y.device)
    with _on(y):
        torch.library.wrap_triton(kernels.stem_pool)[(triton.cdiv(windows, WINDOWS),)](
            y, scale, shift, out, own, place, windows, height, width, channels,
            KEEP=keep, BLOCK=WINDOWS, BLOCK_C=triton.next_power_of_2(channels), num_warps=4,
        )  # fmt: skip
    return out, own, place


@_op("norm_relu_pool_backward")
def norm_relu_pool_backward(
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

    from effcore.ops import _norm_relu_pool_kernels as kernels

    batch, height, width, channels = y.shape
    windows, block_c = batch * ((height + 1) // 2) * ((width + 1) // 2), triton.next_power_of_2(channels)
    gradient = gradient.contiguous()
    programs = triton.cdiv(windows, SUMS * ROUNDS)
    sums = torch.empty((programs, 2, channels), dtype=torch.float32, device=y.device)
    wrap = torch.library.wrap_triton
    with _on(y):
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
    with _on(y):
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
    dy, dgamma, dbeta = norm_relu_pool_backward(gradient, *ctx.saved_tensors, ctx.eps, ctx.training)
    return dy, dgamma, dbeta, None, None, None, None, None


if TRITON:
    norm_relu_pool.register_autograd(_gradients, setup_context=_setup)
