"""Convolution and selective scan on arrays; see :mod:`effcore.array`, and :mod:`effcore.ops.scan` for the same on torch
tensors."""

from __future__ import annotations

from typing import NamedTuple

from effcore.array._native import Array, call

_KEEP = 16  # tokens between two kept states


class ScanStates:
    """What the backward of a scan needs: its inputs, and the state before each 16 tokens.

    Attributes:
        states: [pieces, N, E] float32 (float64 for float64 inputs).
    """

    __slots__ = ("arguments", "states")

    def __init__(self, arguments: tuple, states: Array):
        self.arguments, self.states = arguments, states

    def __repr__(self) -> str:
        return f"ScanStates(x={self.arguments[0].shape}, states={self.states.shape})"


class ScanGradients(NamedTuple):
    """Gradients of a scan: of parameters and states in float32 (float64); None for what was not given."""

    x: Array
    dt: Array
    A: Array
    B: Array
    C: Array
    D: Array | None
    z: Array | None
    dt_bias: Array | None
    initial_state: Array | None


class ConvolutionGradients(NamedTuple):
    """Gradients of a causal convolution: of weight and bias in float32 (float64); None for what was not given."""

    x: Array
    weight: Array
    bias: Array | None
    initial_state: Array | None


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    silu: bool = False,
    initial_state: Array | None = None,
    offsets: Array | None = None,
) -> Array:
    """A depthwise convolution over the last tokens: out[t] = act(bias + Σₖ weight[:, k] · x[t - K + 1 + k]).

    Args:
        x: [B, L, E].
        weight: [E, K], K from 2 to 8.
        bias: [E].
        silu: act(y) = y sigmoid(y).
        initial_state: the K - 1 tokens before the first, [S, K - 1, E]; zeros where it is None.
        offsets: int32 [S + 1], packed sequences.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    return call("causal_conv1d", x, x, weight, bias, initial_state, offsets, silu, argument="x")


def causal_conv1d_backward(
    dout: Array,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    silu: bool = False,
    initial_state: Array | None = None,
    offsets: Array | None = None,
) -> ConvolutionGradients:
    """Gradients of :func:`causal_conv1d` with the same arguments."""
    arguments = (x, weight, bias, initial_state, offsets, silu)
    return ConvolutionGradients(*call("causal_conv1d_backward", x, dout, *arguments, argument="x"))


def selective_scan(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    *,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    initial_state: Array | None = None,
    offsets: Array | None = None,
) -> tuple[Array, Array]:
    """The selective scan (Gu and Dao, Mamba, 2023): the output [B, L, E], and the state after the last token [S, E, N].

        dt' = softplus(dt + dt_bias)          (each part where given)
        h[t] = exp(dt'[t] A) ∘ h[t - 1] + dt'[t] x[t] B[t]
        out[t] = (h[t] C[t] + D ∘ x[t]) ∘ silu(z[t])

    Args:
        x, dt, z: [B, L, E].
        A: [E, N], N from 1 to 256.
        B, C: [B, L, N].
        D, dt_bias: [E].
        initial_state: [S, E, N] float32 (float64), contiguous.
        offsets: int32 [S + 1]: the one row of the batch holds S sequences; S = B without it.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    arguments = (x, dt, A, B, C, D, z, dt_bias, initial_state, offsets, dt_softplus)
    out, final_state, _ = call("selective_scan", x, *arguments, 0, argument="x")
    return out, final_state


def selective_scan_with_states(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    *,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    initial_state: Array | None = None,
    offsets: Array | None = None,
) -> tuple[Array, Array, ScanStates]:
    """:func:`selective_scan`, and what :func:`selective_scan_backward` needs."""
    arguments = (x, dt, A, B, C, D, z, dt_bias, initial_state, offsets, dt_softplus)
    out, final_state, states = call("selective_scan", x, *arguments, _KEEP, argument="x")
    return out, final_state, ScanStates(arguments, states)


def selective_scan_backward(dout: Array, states: ScanStates, dfinal_state: Array | None = None) -> ScanGradients:
    """Gradients of a scan's inputs.

    Args:
        dout: gradient of the output, [B, L, E].
        states: what :func:`selective_scan_with_states` returned.
        dfinal_state: gradient of the state after the last token, [S, E, N] float32 (float64), contiguous.
    """
    if not isinstance(states, ScanStates):
        raise TypeError(
            f"effcore.array.selective_scan_backward: states must be a ScanStates, got {type(states).__name__}"
        )
    gradients = call(
        "selective_scan_backward",
        states.arguments[0],
        dout,
        dfinal_state,
        *states.arguments,
        states.states,
        _KEEP,
        argument="x",
    )
    return ScanGradients(*gradients)


def selective_step(
    state: Array,
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    *,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
) -> tuple[Array, Array]:
    """One token a row of :func:`selective_scan`, for decoding: ``(out [B, E], state [B, E, N])``; ``state`` is not changed.

    ``x``, ``dt``, ``z`` are [B, E], ``B`` and ``C`` [B, N].
    """
    result = call("selective_step", x, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, argument="x")
    return result  # type: ignore[no-any-return]
