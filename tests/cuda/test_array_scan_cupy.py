"""Convolution and scan of effcore.array on CuPy arrays against the same functions on NumPy arrays."""

from __future__ import annotations

import numpy as np
import pytest

import effcore.array as ea
from tests.cuda.test_array_cupy import cp, poisoned_memory, rng  # noqa: F401  (fixtures; skips where there is no GPU)
from tests.test_array_scan import made

pytestmark = pytest.mark.cuda

SHAPES = [(2, 7, 5, 3, None), (1, 150, 130, 16, [0, 3, 3, 100, 150]), (2, 70, 33, 100, None)]


def assert_same(got, expected, tolerance):
    assert isinstance(got, cp.ndarray) and got.dtype == expected.dtype
    error = np.linalg.norm(got.get().astype("f8") - expected) / np.linalg.norm(expected.astype("f8"))
    assert error <= tolerance, error


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 2e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_scan(rng, shape, dtype, tolerance):  # noqa: F811
    inputs, offsets = made(rng, *shape, dtype)
    dout = rng.standard_normal(inputs["x"].shape).astype(dtype)

    def run(inputs, offsets, dout):
        out, state, states = ea.selective_scan_with_states(**inputs, offsets=offsets, dt_softplus=True)
        return [out, state, *ea.selective_scan_backward(dout, states)]

    moved = {n: cp.asarray(t) for n, t in inputs.items()}, None if offsets is None else cp.asarray(offsets)
    for got, expected in zip(run(*moved, cp.asarray(dout)), run(inputs, offsets, dout), strict=True):
        assert_same(got, expected, tolerance)


def test_step_and_convolution(rng):  # noqa: F811
    inputs, _ = made(rng, 3, 1, 40, 16, None, "float32")
    state = inputs.pop("initial_state")
    one = {n: t[:, 0] if n in ("x", "dt", "B", "C", "z") else t for n, t in inputs.items()}
    results = [
        ea.selective_step(s, **o)
        for s, o in ((state, one), (cp.asarray(state), {n: cp.asarray(t) for n, t in one.items()}))
    ]
    for expected, got in zip(*results, strict=True):
        assert_same(got, expected, 1e-5)
    x, weight, dout = (rng.standard_normal(s).astype("f4") for s in ((2, 90, 33), (33, 4), (2, 90, 33)))
    moved = [cp.asarray(t) for t in (x, weight, dout)]
    assert_same(ea.causal_conv1d(*moved[:2], silu=True), ea.causal_conv1d(x, weight, silu=True), 1e-5)
    gradients = ea.causal_conv1d_backward(dout, x, weight, silu=True)
    for got, expected in zip(ea.causal_conv1d_backward(moved[2], *moved[:2], silu=True)[:2], gradients, strict=False):
        assert_same(got, expected, 1e-5)
