"""Causal convolution and the selective scan, as recurrences in plain torch.

Differentiable by torch's own autograd, in whatever dtype the inputs have; a state in 16 bits would drift, so sums and states
are float32 at least.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _sequences(x: Tensor, offsets: Tensor | None) -> list[tuple[int, int, int]]:
    """(row, begin, end) of each sequence."""
    if offsets is None:
        return [(b, 0, x.shape[1]) for b in range(x.shape[0])]
    bounds = offsets.tolist()
    return [(0, begin, end) for begin, end in itertools.pairwise(bounds)]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """out[t] = act(bias + sum_k weight[:, k] · x[t - K + 1 + k]), with initial_state before the first token."""
    width = weight.shape[1]
    out = torch.zeros_like(_wide(x))
    for s, (row, begin, end) in enumerate(_sequences(x, offsets)):
        before = _wide(x).new_zeros(width - 1, x.shape[2]) if initial_state is None else _wide(initial_state[s])
        padded = torch.cat([before, _wide(x)[row, begin:end]])
        y = torch.stack([padded[k : k + end - begin] * _wide(weight)[:, k] for k in range(width)]).sum(0)
        y = y if bias is None else y + _wide(bias)
        out[row, begin:end] = F.silu(y) if activation == "silu" else y
    return out.to(x.dtype)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    offsets: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """h[t] = exp(dt[t] A) h[t - 1] + dt[t] B[t] x[t];  y[t] = (C[t] · h[t] + D x[t]) silu(z[t])."""
    wx, wdt, wB, wC = map(_wide, (x, dt, B, C))
    if dt_bias is not None:
        wdt = wdt + _wide(dt_bias)
    if dt_softplus:
        wdt = F.softplus(wdt)
    rows: dict[int, list[Tensor]] = {b: [] for b in range(x.shape[0])}
    finals = []
    for s, (b, begin, end) in enumerate(_sequences(x, offsets)):
        h = wx.new_zeros(A.shape) if initial_state is None else _wide(initial_state[s])
        for t in range(begin, end):
            h = torch.exp(wdt[b, t, :, None] * _wide(A)) * h + (wdt[b, t] * wx[b, t])[:, None] * wB[b, t]
            rows[b].append((h * wC[b, t]).sum(-1))
        finals.append(h)
    empty = wx.new_zeros(0, x.shape[2])
    y = torch.stack([torch.stack(r) if r else empty for r in rows.values()]) if rows else torch.zeros_like(wx)
    if D is not None:
        y = y + wx * _wide(D)
    if z is not None:
        y = y * F.silu(_wide(z))
    out = y.to(x.dtype)
    if not return_final_state:
        return out
    return out, torch.stack(finals) if finals else wx.new_zeros(0, *A.shape)


def selective_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of :func:`selective_scan` for each row."""
    x, dt, B, C = (t[:, None] for t in (x, dt, B, C))
    z = None if z is None else z[:, None]
    out, state = selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, state, True)
    return out[:, 0], state
