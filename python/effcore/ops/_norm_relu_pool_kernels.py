"""Triton kernels of :mod:`effcore.ops.norm_relu_pool`: max_pool(relu(norm(y))) and its gradients.

y [B, H, W, C] has windows of 3×3, stride 2 and padding 1: [B, ceil(H / 2), ceil(W / 2), C]. All is bound by memory. In units
of y's bytes: the statistics read 1; the maximum reads 1 and writes 0.6 (each window's result, its own y, and which of the nine
it was, a byte); the norm's two sums need the windows' own y and gradient alone, 0.6; y's gradient reads 1.4 and writes 1. Norm,
ReLU and maximum one by one move 11. The sums of programs are written, and added in order: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(9)  # the place of a window without a positive number


@triton.jit
def _split(index, height, width):
    """(image, row, column) of what is counted through."""
    rest = index // width
    return (rest // height).to(tl.int64), rest % height, index % width


@triton.jit
def stem_sums(y, sums, rows, rounds, channels, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Σ (y - y₀) and Σ (y - y₀)² of y [rows, C] over a program's rows: sums [programs, 2, C].

    y₀, the first row, is near the mean, so that squares do not cancel.
    """
    c = tl.arange(0, BLOCK_C)
    there = c < channels
    first = tl.load(y + c, mask=there, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for round in range(rounds):
        row = (tl.program_id(0).to(tl.int64) + round * tl.num_programs(0)) * BLOCK + tl.arange(0, BLOCK)
        kept = (row < rows)[:, None] & there[None, :]
        value = tl.load(y + row[:, None] * channels + c[None, :], mask=kept, other=0.0).to(tl.float32)
        value = tl.where(kept, value - first, 0.0)
        total += value
        squares += value * value
    to = sums + tl.program_id(0) * 2 * channels + c
    tl.store(to, tl.sum(total, 0), mask=there)
    tl.store(to + channels, tl.sum(squares, 0), mask=there)


@triton.jit
def stem_pool(
    y, scale, shift, out, own, place, count, height, width, channels,
    KEEP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = max over windows of relu(scale · y + shift); and where kept, its y, and which of the nine it was, or NONE.

    What lies outside is replaced by the nearest inside, which is in the window too.
    """
    window = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image, i, j = _split(tl.minimum(window, count - 1), (height + 1) // 2, (width + 1) // 2)
    c = tl.arange(0, BLOCK_C)
    a = tl.load(scale + c, mask=c < channels, other=0.0)[None, :]
    b = tl.load(shift + c, mask=c < channels, other=0.0)[None, :]
    sign = tl.where(a < 0, -1.0, 1.0)  # the greatest number of a norm that turns them round is the least
    most = tl.full((BLOCK, BLOCK_C), float("-inf"), tl.float32)
    which = tl.zeros((BLOCK, BLOCK_C), tl.int32)
    for r in tl.static_range(3):
        row = tl.minimum(tl.maximum(2 * i - 1 + r, 0), height - 1)
        for s in tl.static_range(3):
            column = tl.minimum(tl.maximum(2 * j - 1 + s, 0), width - 1)
            at = y + ((image * height + row) * width + column)[:, None] * channels + c[None, :]
            value = sign * tl.load(at, mask=c[None, :] < channels, other=0.0).to(tl.float32)
            number = 3 * (row - 2 * i + 1) + column - 2 * j + 1
            which = tl.where(value > most, number[:, None], which)  # the first one of equals
            most = tl.maximum(most, value, propagate_nan=tl.PropagateNan.ALL)
    most *= sign
    result = most * a + b
    to = window.to(tl.int64)[:, None] * channels + c[None, :]
    kept = (window < count)[:, None] & (c[None, :] < channels)
    tl.store(out + to, tl.where(result <= 0, 0.0, result).to(out.dtype.element_ty), mask=kept)
    if KEEP:
        tl.store(own + to, most.to(own.dtype.element_ty), mask=kept)
        tl.store(place + to, tl.where(result > 0, which, NONE).to(tl.int8), mask=kept)


@triton.jit
def stem_reduce(
    gradient, own, place, mean, sums, count, channels, BLOCK: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Σ g and Σ g (y - mean) over windows that have a positive number: sums [programs, 2, C]."""
    program = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    center = tl.load(mean + c, mask=c < channels, other=0.0)[None, :]
    first = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for round in range(ROUNDS):
        window = (program * ROUNDS + round) * BLOCK + tl.arange(0, BLOCK)
        kept = (window < count)[:, None] & (c[None, :] < channels)
        at = window.to(tl.int64)[:, None] * channels + c[None, :]
        g = tl.load(gradient + at, mask=kept, other=0.0).to(tl.float32)
        value = tl.load(own + at, mask=kept, other=0.0).to(tl.float32)
        g = tl.where(tl.load(place + at, mask=kept, other=NONE) < NONE, g, 0.0)
        first += g
        second += g * (value - center)
    to = sums + program * 2 * channels + c
    tl.store(to, tl.sum(first, 0), mask=c < channels)
    tl.store(to + channels, tl.sum(second, 0), mask=c < channels)


@triton.jit
def _window(gradient, place, window, there, c, channels):
    """A window's gradient and place."""
    at = window[:, None] * channels + c[None, :]
    kept = there[:, None] & (c[None, :] < channels)
    g = tl.load(gradient + at, mask=kept, other=0.0).to(tl.float32)
    return g, tl.load(place + at, mask=kept, other=NONE)


@triton.jit
def _give(y, dy, at, kept, a, b, d, g):
    value = tl.load(y + at, mask=kept, other=0.0).to(tl.float32)
    tl.store(dy + at, (a * g + b * value + d).to(dy.dtype.element_ty), mask=kept)


@triton.jit
def stem_spread(
    gradient, place, y, dy, scale, slope, offset, count, height, width, channels,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dy = scale · (gradients of the windows that chose it) + slope · y + offset, for squares of 2×2 numbers.

    The first number of a square is in the middle of the window of its place; the others are also in the next ones' margins.
    """
    square = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = square < count
    down, across = (height + 1) // 2, (width + 1) // 2
    image, i, j = _split(tl.minimum(square, count - 1), down, across)
    c = tl.arange(0, BLOCK_C)
    a = tl.load(scale + c, mask=c < channels, other=0.0)[None, :]
    b = tl.load(slope + c, mask=c < channels, other=0.0)[None, :]
    d = tl.load(offset + c, mask=c < channels, other=0.0)[None, :]
    window = (image * down + i) * across + j
    below, beside = real & (i + 1 < down), real & (j + 1 < across)
    g, p = _window(gradient, place, window, real, c, channels)
    g_beside, p_beside = _window(gradient, place, window + 1, beside, c, channels)
    g_below, p_below = _window(gradient, place, window + across, below, c, channels)
    g_both, p_both = _window(gradient, place, window + across + 1, below & beside, c, channels)
    at = ((image * height + 2 * i) * width + 2 * j)[:, None] * channels + c[None, :]
    kept = real[:, None] & (c[None, :] < channels)
    right, under = kept & (2 * j + 1 < width)[:, None], (2 * i + 1 < height)[:, None]
    _give(y, dy, at, kept, a, b, d, tl.where(p == 4, g, 0.0))
    _give(y, dy, at + channels, right, a, b, d, tl.where(p == 5, g, 0.0) + tl.where(p_beside == 3, g_beside, 0.0))
    at = ((image * height + 2 * i + 1) * width + 2 * j)[:, None] * channels + c[None, :]
    _give(y, dy, at, kept & under, a, b, d, tl.where(p == 7, g, 0.0) + tl.where(p_below == 1, g_below, 0.0))
    both = tl.where(p == 8, g, 0.0) + tl.where(p_beside == 6, g_beside, 0.0)
    both += tl.where(p_below == 2, g_below, 0.0) + tl.where(p_both == 0, g_both, 0.0)
    _give(y, dy, at + channels, right & under, a, b, d, both)
