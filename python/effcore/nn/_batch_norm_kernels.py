"""Triton kernel of :mod:`effcore.nn.batch_norm`: a batch's statistics, each number read once.

A program sums up some rows of BLOCK_C channels, apart from a number near their mean (the first row's: the same one for all
programs), so that squares do not cancel. Bound by memory: rows · C numbers are read, two sums a channel and program written.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def batch_sums(x, sums, rows, rounds, channels, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Σ (x - x₀) and Σ (x - x₀)² of x [rows, C] over a program's rows: sums [programs, 2, C]."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < channels
    first = tl.load(x + c, mask=there, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for round in range(rounds):
        row = (tl.program_id(0).to(tl.int64) + round * tl.num_programs(0)) * BLOCK + tl.arange(0, BLOCK)
        kept = (row < rows)[:, None] & there[None, :]
        value = tl.load(x + row[:, None] * channels + c[None, :], mask=kept, other=0.0).to(tl.float32)
        value = tl.where(kept, value - first, 0.0)
        total += value
        squares += value * value
    to = sums + tl.program_id(0) * 2 * channels + c
    tl.store(to, tl.sum(total, 0), mask=there)
    tl.store(to + channels, tl.sum(squares, 0), mask=there)
