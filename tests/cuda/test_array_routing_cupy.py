"""Token movement of effcore.array on CuPy arrays against the same functions on NumPy arrays."""

from __future__ import annotations

import numpy as np
import pytest

import effcore.array as ea
from tests.cuda.test_array_cupy import cp, poisoned_memory, rng  # noqa: F401  (fixtures; skips where there is no GPU)

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("batch, tokens, keep, channels", [(2, 7, 3, 5), (3, 197, 89, 384), (2, 33, 0, 17)])
def test_movement(rng, batch, tokens, keep, channels, dtype):  # noqa: F811
    x, residual = (rng.standard_normal((batch, tokens, channels)).astype(dtype) for _ in range(2))
    scores = rng.standard_normal((batch, tokens)).astype("f4")

    def run(x, residual, scores):
        kept, rest = ea.partition_tokens(scores, keep)
        a, b = ea.separate_tokens(x, kept, rest)
        merged = ea.merge_tokens(a, kept, b, rest, residual=residual, residual_a=a)
        return [kept, rest, a, b, merged, ea.gather_tokens(x, rest), ea.gather_tokens_backward(a, kept, tokens)]

    for got, expected in zip(run(*map(cp.asarray, (x, residual, scores))), run(x, residual, scores), strict=True):
        assert isinstance(got, cp.ndarray) and got.dtype == expected.dtype
        np.testing.assert_allclose(got.get(), expected, rtol=2e-3 if dtype == "float16" else 1e-6)


@pytest.mark.parametrize("rms", [False, True])
def test_scores_and_norms(rng, rms):  # noqa: F811
    q, k = rng.standard_normal((2, 6, 1, 64)).astype("f4"), rng.standard_normal((2, 2, 300, 64)).astype("f4")
    scores = ea.class_scores(q, k)
    np.testing.assert_allclose(ea.class_scores(cp.asarray(q), cp.asarray(k)).get(), scores, rtol=1e-4)
    kept, rest = ea.score_partition(cp.asarray(q), cp.asarray(k), 100, protect=1)
    assert kept.shape == (2, 100) and rest.shape == (2, 200) and not kept[:, 0].get().any()
    x, weight = rng.standard_normal((2, 300, 96)).astype("f4"), rng.standard_normal(96).astype("f4")
    dnormed = rng.standard_normal((2, 100, 96)).astype("f4")

    def run(x, kept, weight, dnormed):
        got = ea.gather_rms_norm(x, kept, weight) if rms else ea.gather_layer_norm(x, kept, weight, weight)
        return [got.tokens, got.normed, *ea.gather_norm_backward(dnormed, got, dnormed)]

    expected = run(x, kept.get(), weight, dnormed)
    for a, b in zip(run(cp.asarray(x), kept, cp.asarray(weight), cp.asarray(dnormed)), expected, strict=True):
        np.testing.assert_allclose(a.get(), b, rtol=1e-3, atol=1e-4)


def test_lists_of_another_device_are_refused(rng):  # noqa: F811
    x = cp.asarray(rng.standard_normal((1, 4, 8)).astype("f4"))
    with pytest.raises(ValueError, match="index is on cpu but its tokens are on cuda"):
        ea.gather_tokens(x, np.zeros((1, 2), np.int32))
