"""Convolution and scan of effcore.array against the recurrence in NumPy, and the gradients against differences."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest

import effcore.array as ea
from tests import test_array
from tests.test_array import DTYPES, dtype_of, poisoned_memory, rng  # noqa: F401  (fixtures)

assert_close = partial(test_array.assert_close, factor=2.0)

SHAPES = [(1, 1, 1, 1, None), (2, 7, 5, 3, None), (2, 0, 4, 2, None), (1, 40, 33, 16, [0, 3, 3, 20, 40])]


def made(rng, batch, tokens, channels, states, cuts, dtype):  # noqa: F811
    sequences = batch if cuts is None else len(cuts) - 1

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype_of(dtype))

    wide = np.float64 if dtype == "float64" else np.float32
    inputs = {
        "x": normal(batch, tokens, channels),
        "dt": normal(batch, tokens, channels),
        "A": -np.abs(rng.standard_normal((channels, states))).astype(wide),
        "B": normal(batch, tokens, states),
        "C": normal(batch, tokens, states),
        "D": rng.standard_normal(channels).astype(wide),
        "z": normal(batch, tokens, channels),
        "dt_bias": rng.standard_normal(channels).astype(wide),
        "initial_state": rng.standard_normal((sequences, channels, states)).astype(wide),
    }
    offsets = None if cuts is None else np.array(cuts, np.int32)
    return inputs, offsets


def recurrence(x, dt, A, B, C, D, z, dt_bias, initial_state, offsets):
    """(out, final_state) in float64."""
    x, dt, A, B, C, D, z, dt_bias, h0 = (t.astype(np.float64) for t in (x, dt, A, B, C, D, z, dt_bias, initial_state))
    out, finals = np.zeros_like(x), []
    step = np.logaddexp(0, dt + dt_bias)
    rows = [(b, 0, x.shape[1]) for b in range(len(x))]
    if offsets is not None:
        rows = [(0, begin, end) for begin, end in itertools.pairwise(offsets)]
    for h, (b, begin, end) in zip(h0, rows, strict=True):
        for t in range(begin, end):
            h = np.exp(step[b, t][:, None] * A) * h + (step[b, t] * x[b, t])[:, None] * B[b, t]
            out[b, t] = (h @ C[b, t] + D * x[b, t]) * z[b, t] / (1 + np.exp(-z[b, t]))
        finals.append(h)
    return out, np.stack(finals)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scan(rng, shape, dtype):  # noqa: F811
    inputs, offsets = made(rng, *shape, dtype)
    exact, last = recurrence(**inputs, offsets=offsets)
    out, state = ea.selective_scan(**inputs, offsets=offsets, dt_softplus=True)
    assert out.dtype == inputs["x"].dtype and state.dtype == inputs["initial_state"].dtype
    assert_close(out, exact, dtype)
    assert_close(state, last, dtype)


def test_steps_are_the_scan(rng):  # noqa: F811
    inputs, _ = made(rng, 2, 6, 9, 16, None, "float32")
    out, last = ea.selective_scan(**inputs, dt_softplus=True)
    state = inputs.pop("initial_state")
    for t in range(6):
        one = {n: v[:, t] if n in ("x", "dt", "B", "C", "z") else v for n, v in inputs.items()}
        y, state = ea.selective_step(state, **one, dt_softplus=True)
        np.testing.assert_allclose(y, out[:, t], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]])
def test_scan_gradients(rng, shape):  # noqa: F811
    inputs, offsets = made(rng, *shape, "float64")
    out, last, states = ea.selective_scan_with_states(**inputs, offsets=offsets, dt_softplus=True)
    dout, dlast = rng.standard_normal(out.shape), rng.standard_normal(last.shape)
    gradients = ea.selective_scan_backward(dout, states, dlast)
    for name, value in inputs.items():
        along, h = rng.standard_normal(value.shape), 1e-6
        moved = [recurrence(**inputs | {name: value + s * h * along}, offsets=offsets) for s in (1, -1)]
        expected = ((moved[0][0] - moved[1][0]) * dout).sum() + ((moved[0][1] - moved[1][1]) * dlast).sum()
        got = (getattr(gradients, name) * along).sum()
        np.testing.assert_allclose(got, expected / (2 * h), rtol=1e-6, atol=1e-7, err_msg=name)


def convolution(x, weight, bias, initial_state):
    padded = np.concatenate([initial_state, x], 1).astype(np.float64)
    width = weight.shape[1]
    y = bias + sum(padded[:, k : k + x.shape[1]] * weight[:, k] for k in range(width))
    return y / (1 + np.exp(-y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 4, 8])
def test_convolution(rng, width, dtype):  # noqa: F811
    x, weight = rng.standard_normal((2, 11, 6)), rng.standard_normal((6, width))
    bias, initial = rng.standard_normal(6), rng.standard_normal((2, width - 1, 6))
    x, weight, bias, initial = (t.astype(dtype_of(dtype)) for t in (x, weight, bias, initial))
    exact = convolution(*(t.astype(np.float64) for t in (x, weight, bias, initial)))
    assert_close(ea.causal_conv1d(x, weight, bias, silu=True, initial_state=initial), exact, dtype)
    if dtype != "float64":
        return
    dout = rng.standard_normal(x.shape)
    gradients = ea.causal_conv1d_backward(dout, x, weight, bias, silu=True, initial_state=initial)
    inputs = {"x": x, "weight": weight, "bias": bias, "initial_state": initial}
    for name, value in inputs.items():
        along, h = rng.standard_normal(value.shape), 1e-6
        moved = [convolution(**inputs | {name: value + s * h * along}) for s in (1, -1)]
        expected = ((moved[0] - moved[1]) * dout).sum() / (2 * h)
        np.testing.assert_allclose((getattr(gradients, name) * along).sum(), expected, rtol=1e-6, atol=1e-7)


def test_absent_parts_have_no_gradient(rng):  # noqa: F811
    x, A, B = rng.standard_normal((1, 20, 4)), -np.ones((4, 2)), rng.standard_normal((1, 20, 2))
    out, _, states = ea.selective_scan_with_states(x, x, A, B, B)
    gradients = ea.selective_scan_backward(np.ones_like(out), states)
    assert gradients.D is gradients.z is gradients.dt_bias is gradients.initial_state is None
    assert ea.causal_conv1d_backward(out, x, np.ones((4, 2))).bias is None


def test_refusals(rng):  # noqa: F811
    inputs, _ = made(rng, 2, 7, 5, 3, None, "float32")
    with pytest.raises(ValueError, match=r"effcore\.array\.selective_scan: B must have shape \[2, 7, 3\]"):
        ea.selective_scan(**inputs | {"B": inputs["B"][:, :5]})
    with pytest.raises(ValueError, match="x must have one row of packed sequences"):
        ea.selective_scan(**inputs, offsets=np.array([0, 7], np.int32))
    with pytest.raises(TypeError, match="states must be a ScanStates"):
        ea.selective_scan_backward(inputs["x"], inputs["x"])
    with pytest.raises(ValueError, match="weight has 9 taps"):
        ea.causal_conv1d(inputs["x"], np.ones((5, 9), np.float32))
