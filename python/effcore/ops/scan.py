r"""The recurrent half of state-space models: a short causal convolution, and the selective scan of Mamba-1.

``x`` is [B, L, E] in float32, bfloat16 or float16 (float64 on the CPU as well), with any strides as long as the last dimension
is contiguous, as are all tensors of tokens: parts of a fused projection need no copy. Parameters are in x's dtype or in
float32. The state, [B, E, N], and all sums are float32 (float64 for float64 tensors).

Packed sequences: with ``offsets`` int32 [S + 1] the batch has one row, and sequence s is its tokens offsets[s] to
offsets[s + 1] (0 ... L, not falling). Each has its own state: ``initial_state`` and the final state have S rows instead of B.
Values of offsets are checked on the CPU; on CUDA they are the caller's to get right.

Results are fresh and contiguous, and the same bits in every run. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcore.ops import _scan_autograd as _autograd

__all__ = ["causal_conv1d", "convolution_state", "selective_scan", "selective_step"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """A depthwise convolution over the last tokens: out[t] = act(bias + Σₖ weight[:, k] · x[t - K + 1 + k]).

    Differentiable in x, weight, bias and initial_state.

    Args:
        x: [B, L, E]; so is the result, in x's dtype.
        weight: [E, K], K from 2 to 8.
        bias: [E].
        activation: None or ``"silu"``.
        initial_state: the K - 1 tokens before the first, [B, K - 1, E] in x's dtype (see :func:`convolution_state`); zeros
            where it is None.
        offsets: int32 [S + 1], packed sequences.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"effcore.causal_conv1d: activation must be None or 'silu', got {activation!r}")
    return _autograd.causal_conv1d(x, weight, bias, initial_state, offsets, activation == "silu")


def convolution_state(x: Tensor, width: int, initial_state: Tensor | None = None) -> Tensor:
    """The last ``width - 1`` tokens that :func:`causal_conv1d` saw, [B, width - 1, E]: its next ``initial_state``.

    Args:
        x: [B, L, E], L may be less than ``width - 1``: older tokens come from ``initial_state``, or are zeros.
    """
    halo = width - 1
    if x.shape[1] >= halo:
        return x[:, x.shape[1] - halo :].contiguous()
    before = x.new_zeros(x.shape[0], halo, x.shape[2]) if initial_state is None else initial_state
    return torch.cat([before, x], 1)[:, -halo:].contiguous()


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
    """The selective scan (Gu and Dao, Mamba, 2023, algorithm 2), with its gate, skip and step size fused.

        dt' = softplus(dt + dt_bias)          (each part where given)
        h[t] = exp(dt'[t] A) ∘ h[t - 1] + dt'[t] x[t] B[t]
        out[t] = (h[t] C[t] + D ∘ x[t]) ∘ silu(z[t])

    Differentiable in all tensors but offsets; the backward recomputes the states.

    Args:
        x, dt, z: [B, L, E].
        A: [E, N], N from 1 to 256. Negative in a stable model; any value is computed.
        B, C: [B, L, N].
        D, dt_bias: [E].
        initial_state: [B, E, N] float32 (float64), contiguous.
        return_final_state: also return the state after the last token, [B, E, N].
        offsets: int32 [S + 1], packed sequences.

    Returns:
        [B, L, E] in x's dtype, or that and the final state. A NaN in a token of a channel stays in that channel from there on.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    out, final_state, _ = _autograd.selective_scan(
        x, dt, A, B, C, D, z, dt_bias, initial_state, offsets, dt_softplus, 0
    )
    return (out, final_state) if return_final_state else out


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
    """One token of :func:`selective_scan` for each row, for decoding. Not differentiable.

    Args:
        state: [B, E, N] float32 (float64), contiguous; not changed.
        x, dt, z: [B, E].
        A, D, dt_bias, dt_softplus: as in :func:`selective_scan`.
        B, C: [B, N].

    Returns:
        ``(out, state)``: [B, E] in x's dtype, and the new state.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    return _autograd.selective_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
