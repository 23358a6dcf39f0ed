"""Triton kernels of :mod:`effcore.nn.stem`: y = conv(x), out = max_pool(relu(norm(y))), and their gradients but x's.

x are squares of 2×2 pixels [B, Hs, Ws, 16], y [B, H, W, C] with H = Hs - 3, the windows of 3×3, stride 2, padding 1 are
[B, ceil(H / 2), ceil(W / 2), C]. All is bound by memory; in units of y's bytes (C = 64):

    forward   x read, y written and its sums taken on the way (1.3); y read, the windows written (1.6)
    backward  the norm's two sums need each window's own y alone (0.6); then y and the windows are read, and what y's gradient
              would be goes from registers into the weight's (1.6)

where a norm, a ReLU and a pool in turn move y's bytes eleven times. Sums of blocks are written, and added in order: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

TAPS = tl.constexpr(4)  # of the convolution over squares, each way
DEPTH = tl.constexpr(16)  # channels of a square
ROW = tl.constexpr(64)  # numbers of x that one row of the kernel multiplies; they lie together
NONE = tl.constexpr(9)  # the place of a window without a positive number


@triton.jit
def _pixels(index, height, width):
    """(image, row, column) of pixels counted through."""
    column = index % width
    rest = index // width
    return rest // height, rest % height, column


@triton.jit
def stem_convolve(x, weight, y, sums, count, height, width, channels, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """y = conv(x), and for each block of pixels Σ y and Σ (y - its mean)² [blocks, 2, C]. weight [256, C]."""
    block = tl.program_id(0)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    real = pixel < count
    image, row, column = _pixels(tl.where(real, pixel, 0), height, width)
    c, k = tl.arange(0, BLOCK_C), tl.arange(0, ROW)
    wide = (width + TAPS - 1) * DEPTH
    at = x + (image.to(tl.int64) * (height + TAPS - 1) + row) * wide + column * DEPTH
    sum = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for tap in tl.static_range(TAPS):
        part = tl.load(at[:, None] + tap * wide + k[None, :])
        w = tl.load(weight + (k + tap * ROW)[:, None] * channels + c[None, :], mask=c[None, :] < channels, other=0.0)
        sum = tl.dot(part, w, sum)
    rounded = sum.to(y.dtype.element_ty)
    kept = real[:, None] & (c[None, :] < channels)
    tl.store(y + pixel.to(tl.int64)[:, None] * channels + c[None, :], rounded, mask=kept)
    value = tl.where(kept, rounded.to(tl.float32), 0.0)
    total = tl.sum(value, 0)
    apart = tl.where(kept, value - (total / tl.minimum(count - block * BLOCK, BLOCK))[None, :], 0.0)
    to = sums + block * 2 * channels + c
    tl.store(to, total, mask=c < channels)
    tl.store(to + channels, tl.sum(apart * apart, 0), mask=c < channels)


@triton.jit
def stem_pool(
    y, scale, shift, out, own, place, count, height, width, channels,
    KEEP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = max over windows of relu(scale · y + shift); and where kept, its y, and which of the nine it was, or NONE."""
    window = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = window < count
    image, i, j = _pixels(tl.where(real, window, 0), (height + 1) // 2, (width + 1) // 2)
    c = tl.arange(0, BLOCK_C)
    a = tl.load(scale + c, mask=c < channels, other=0.0)[None, :]
    b = tl.load(shift + c, mask=c < channels, other=0.0)[None, :]
    most = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    source = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    which = tl.full((BLOCK, BLOCK_C), NONE, tl.int32)
    first = (image.to(tl.int64) * height + (2 * i - 1)) * width + 2 * j - 1
    for r in tl.static_range(3):
        for s in tl.static_range(3):
            h, w = 2 * i - 1 + r, 2 * j - 1 + s
            inside = real & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            kept = inside[:, None] & (c[None, :] < channels)
            at = y + (first + r * width + s)[:, None] * channels + c[None, :]
            v = tl.load(at, mask=kept, other=0.0).to(tl.float32)
            z = (v * a + b).to(out.dtype.element_ty).to(tl.float32)
            better = kept & ((z > most) | (z != z))  # the first one of equals, and not a number of all
            most = tl.where(better, z, most)
            source = tl.where(better, v, source)
            which = tl.where(better, 3 * r + s, which)
    to = window.to(tl.int64)[:, None] * channels + c[None, :]
    kept = real[:, None] & (c[None, :] < channels)
    tl.store(out + to, most.to(out.dtype.element_ty), mask=kept)
    if KEEP:
        tl.store(own + to, source.to(own.dtype.element_ty), mask=kept)
        tl.store(place + to, which.to(tl.int8), mask=kept)


@triton.jit
def stem_reduce(
    gradient, own, place, mean, sums, count, channels, BLOCK: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Σ g and Σ g (y - mean) over windows that have a positive number [blocks, 2, C]."""
    block = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    center = tl.load(mean + c, mask=c < channels, other=0.0)[None, :]
    first = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for round in range(ROUNDS):
        window = (block * ROUNDS + round) * BLOCK + tl.arange(0, BLOCK)
        kept = (window < count)[:, None] & (c[None, :] < channels)
        at = window.to(tl.int64)[:, None] * channels + c[None, :]
        g = tl.load(gradient + at, mask=kept, other=0.0).to(tl.float32)
        v = tl.load(own + at, mask=kept, other=0.0).to(tl.float32)
        g = tl.where(tl.load(place + at, mask=kept, other=NONE) < NONE, g, 0.0)
        first += g
        second += g * (v - center)
    to = sums + block * 2 * channels + c
    tl.store(to, tl.sum(first, 0), mask=c < channels)
    tl.store(to + channels, tl.sum(second, 0), mask=c < channels)


@triton.jit
def _arrived(gradient, place, window, number, c, channels, there):
    """The gradient of the windows for which a pixel is their ``number``-th."""
    kept = there[:, None] & (c[None, :] < channels)
    at = window[:, None] * channels + c[None, :]
    which = tl.load(place + at, mask=kept, other=NONE)
    g = tl.load(gradient + at, mask=kept, other=0.0).to(tl.float32)
    return tl.where(which.to(tl.int32) == number[:, None], g, 0.0)


@triton.jit
def stem_weight_gradient(
    x, y, gradient, place, scale, slope, offset, sums, count, rounds, height, width, channels,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Σ over a program's pixels of x ⊗ dy [programs, 256, C], where dy = scale · (windows' g) + slope · y + offset."""
    c, k = tl.arange(0, BLOCK_C), tl.arange(0, ROW)
    a = tl.load(scale + c, mask=c < channels, other=0.0)[None, :]
    b = tl.load(slope + c, mask=c < channels, other=0.0)[None, :]
    d = tl.load(offset + c, mask=c < channels, other=0.0)[None, :]
    sum0 = tl.zeros((ROW, BLOCK_C), tl.float32)
    sum1 = tl.zeros((ROW, BLOCK_C), tl.float32)
    sum2 = tl.zeros((ROW, BLOCK_C), tl.float32)
    sum3 = tl.zeros((ROW, BLOCK_C), tl.float32)
    wide = (width + TAPS - 1) * DEPTH
    down, across = (height + 1) // 2, (width + 1) // 2
    for round in range(rounds):
        pixel = (tl.program_id(0) + round * tl.num_programs(0)) * BLOCK + tl.arange(0, BLOCK)
        real = pixel < count
        image, h, w = _pixels(tl.where(real, pixel, 0), height, width)
        kept = real[:, None] & (c[None, :] < channels)
        v = tl.load(y + pixel.to(tl.int64)[:, None] * channels + c[None, :], mask=kept, other=0.0).to(tl.float32)
        # An even row is in the middle of one window's; an odd one the last of it, and the first of the next one's.
        i, j = h // 2, w // 2
        window = (image.to(tl.int64) * down + i) * across + j
        r, s = 1 + h % 2, 1 + w % 2
        below, beside = real & (r == 2) & (i + 1 < down), real & (s == 2) & (j + 1 < across)
        g = _arrived(gradient, place, window, 3 * r + s, c, channels, real)
        g += _arrived(gradient, place, window + 1, 3 * r, c, channels, beside)
        g += _arrived(gradient, place, window + across, s, c, channels, below)
        g += _arrived(gradient, place, window + across + 1, 0 * s, c, channels, below & beside)
        dy = tl.where(kept, a * g + b * v + d, 0.0).to(y.dtype.element_ty)
        at = x + (image.to(tl.int64) * (height + TAPS - 1) + h) * wide + w * DEPTH
        sum0 = tl.dot(tl.trans(tl.load(at[:, None] + k[None, :])), dy, sum0)
        sum1 = tl.dot(tl.trans(tl.load(at[:, None] + wide + k[None, :])), dy, sum1)
        sum2 = tl.dot(tl.trans(tl.load(at[:, None] + 2 * wide + k[None, :])), dy, sum2)
        sum3 = tl.dot(tl.trans(tl.load(at[:, None] + 3 * wide + k[None, :])), dy, sum3)
    to = sums + (k + tl.program_id(0) * TAPS * ROW)[:, None] * channels + c[None, :]
    held = (c < channels)[None, :]
    tl.store(to, sum0, mask=held)
    tl.store(to + ROW * channels, sum1, mask=held)
    tl.store(to + 2 * ROW * channels, sum2, mask=held)
    tl.store(to + 3 * ROW * channels, sum3, mask=held)
