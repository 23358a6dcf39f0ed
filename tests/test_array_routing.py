"""Token movement of effcore.array against the formulas in NumPy."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import effcore.array as ea
from tests import test_array
from tests.test_array import DTYPES, dtype_of, poisoned_memory, rng  # noqa: F401  (fixtures)

assert_close = partial(test_array.assert_close, factor=2.0)

SHAPES = [
    (1, 1, 1, 1),
    (2, 7, 3, 5),
    (3, 197, 89, 48),
    (2, 33, 0, 17),
    (2, 33, 33, 64),
]  # batch, tokens, keep, channels


def rows(rng, batch, tokens, channels, dtype="float32", layout="plain"):  # noqa: F811
    if layout == "sliced":
        return rng.standard_normal((batch, tokens, channels + 3)).astype(dtype_of(dtype))[..., 1 : channels + 1]
    if layout == "reversed":  # negative strides
        return rng.standard_normal((batch, tokens, channels)).astype(dtype_of(dtype))[::-1, ::-1]
    return rng.standard_normal((batch, tokens, channels)).astype(dtype_of(dtype))


def partition_of(rng, batch, tokens, keep):  # noqa: F811
    order = rng.random((batch, tokens)).argsort(1).astype(np.int32)
    return np.sort(order[:, :keep], 1), np.sort(order[:, keep:], 1)


def take(x, index):
    return np.take_along_axis(x, index[..., None].astype(np.int64), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("protect", [0, 2])
def test_partition(rng, dtype, protect):  # noqa: F811
    scores = rng.integers(0, 5, (4, 50)).astype(dtype_of(dtype))  # many ties
    scores[1, 3:9] = np.nan
    kept, rest = ea.partition_tokens(scores, 20, protect=protect)
    assert kept.dtype == rest.dtype == np.int32
    for b in range(4):
        value = np.where(np.isnan(scores[b].astype(np.float64)), -np.inf, scores[b].astype(np.float64))
        order = sorted(range(50), key=lambda n: (n >= protect, -value[n], n))
        np.testing.assert_array_equal(kept[b], sorted(order[:20]))
        np.testing.assert_array_equal(rest[b], sorted(order[20:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (6, 2), (4, 1)])
def test_class_scores(rng, dtype, heads, kv_heads):  # noqa: F811
    q, k = (
        rng.standard_normal((2, n, tokens, 24)).astype(dtype_of(dtype)) for n, tokens in ((heads, 1), (kv_heads, 40))
    )
    logits = (q.astype(np.float64) @ np.repeat(k.astype(np.float64), heads // kv_heads, 1).swapaxes(2, 3)) * 24**-0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    exact = (weights / weights.sum(-1, keepdims=True))[:, :, 0].mean(1)
    scores = ea.class_scores(q, k)
    assert scores.dtype == (np.float64 if dtype == "float64" else np.float32)
    np.testing.assert_allclose(scores, exact, rtol=1e-5)
    lists = ea.score_partition(q, k, 15, protect=1), ea.partition_tokens(scores, 15, protect=1)
    for got, expected in zip(*lists, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("layout", ["plain", "sliced", "reversed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, tokens, keep, channels", SHAPES)
def test_separate_and_merge(rng, batch, tokens, keep, channels, dtype, layout):  # noqa: F811
    x = rows(rng, batch, tokens, channels, dtype, layout)
    ia, ib = partition_of(rng, batch, tokens, keep)
    a, b = ea.separate_tokens(x, ia, ib)
    np.testing.assert_array_equal(a, take(x, ia))
    np.testing.assert_array_equal(b, take(x, ib))
    assert a.dtype == x.dtype
    np.testing.assert_array_equal(ea.merge_tokens(a, ia, b, ib), x)
    np.testing.assert_array_equal(ea.gather_tokens(x, ia), a)
    own, residual = rows(rng, batch, keep, channels, dtype), rows(rng, batch, tokens, channels, dtype)
    exact = x.astype(np.float64) + residual.astype(np.float64)
    np.put_along_axis(exact, ia[..., None].astype(np.int64), take(exact, ia) + own.astype(np.float64), 1)
    assert_close(ea.merge_tokens(a, ia, b, ib, residual=residual, residual_a=own), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_repeated_token_gets_the_sum(rng, dtype):  # noqa: F811
    index = rng.integers(0, 9, (2, 30)).astype(np.int32)
    dout = rows(rng, 2, 30, 11, dtype)
    exact = np.zeros((2, 12, 11))
    for b in range(2):
        np.add.at(exact[b], index[b], dout[b].astype(np.float64))
    assert_close(ea.gather_tokens_backward(dout, index, 12), exact, dtype)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_and_norm(rng, dtype, rms):  # noqa: F811
    x, weight, bias = rows(rng, 2, 20, 33, dtype), *(rng.standard_normal(33).astype(dtype_of(dtype)) for _ in range(2))
    index = rng.integers(0, 20, (2, 13)).astype(np.int32)
    eps = 1e-3
    got = (
        ea.gather_rms_norm(x, index, weight, eps=eps) if rms else ea.gather_layer_norm(x, index, weight, bias, eps=eps)
    )
    picked, w = take(x, index).astype(np.float64), weight.astype(np.float64)
    mean = 0.0 if rms else picked.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt(((picked - mean) ** 2).mean(-1, keepdims=True) + eps)
    xhat = (picked - mean) * rstd
    np.testing.assert_array_equal(got.tokens, take(x, index))
    assert_close(got.normed, xhat * w + (0 if rms else bias.astype(np.float64)), dtype)
    dnormed, dtokens = rows(rng, 2, 13, 33, dtype), rows(rng, 2, 13, 33, dtype)
    g = dnormed.astype(np.float64)
    inner = g * w
    level = 0.0 if rms else inner.mean(-1, keepdims=True)
    each = rstd * (inner - level - xhat * (inner * xhat).mean(-1, keepdims=True)) + dtokens.astype(np.float64)
    exact = np.zeros((2, 20, 33))
    for b in range(2):
        np.add.at(exact[b], index[b], each[b])
    dx, dweight, dbias = ea.gather_norm_backward(dnormed, got, dtokens)
    assert_close(dx, exact, dtype)
    assert_close(dweight, (g * xhat).sum((0, 1)), dtype)
    assert_close(dbias, g.sum((0, 1)), dtype)


def test_empty():
    for shape in ((0, 5, 8), (2, 0, 8), (2, 5, 0)):
        x = np.zeros(shape, np.float32)
        kept, rest = ea.partition_tokens(np.zeros(shape[:2], np.float32), shape[1] // 2)
        a, b = ea.separate_tokens(x, kept, rest)
        assert ea.merge_tokens(a, kept, b, rest).shape == shape


X = np.zeros((2, 5, 8), np.float32)
A, B = np.array([[0, 2]] * 2, np.int32), np.array([[1, 3, 4]] * 2, np.int32)
BAD = {
    "keep below 0": (lambda: ea.partition_tokens(X[..., 0].copy(), -1), "keep must be from 0 to the 5 tokens"),
    "keep above N": (lambda: ea.partition_tokens(X[..., 0].copy(), 6), "keep must be from 0 to the 5 tokens"),
    "protect": (lambda: ea.partition_tokens(X[..., 0].copy(), 2, protect=3), r"protect must be from 0 to keep \(2\)"),
    "not an array": (lambda: ea.gather_tokens([1.0], A), "x must be a NumPy or CuPy array, got list"),
    "int64 list": (lambda: ea.gather_tokens(X, A.astype(np.int64)), "index is int64|index must be int32"),
    "out of range": (lambda: ea.gather_tokens(X, A + 3), r"index\[0, 1\] is 5 but there are 5 tokens"),
    "negative": (lambda: ea.gather_tokens(X, A - 1), r"index\[0, 0\] is -1"),
    "repeated": (lambda: ea.separate_tokens(X, A, B - 1), "which index_a or index_b has already"),
    "too few": (lambda: ea.separate_tokens(X, A, B[:, 1:]), "does not make the 5 tokens"),
    "rank": (lambda: ea.gather_tokens(X[0], A), "x must have 3 dimensions"),
    "other dtype": (
        lambda: ea.merge_tokens(X[:, :2], A, X[:, 2:].astype(np.float64), B), "b is float64 but must be float32",
    ),
    "residual": (
        lambda: ea.merge_tokens(X[:, :2], A, X[:, 2:], B, residual=X[:, 1:]), "residual must have shape",
    ),
    "weight": (lambda: ea.gather_layer_norm(X, A, np.ones(7, np.float32)), r"weight must have shape \[8\]"),
    "gathered": (lambda: ea.gather_norm_backward(X, X), "gathered must be of GatheredNorm, got ndarray"),
    "queries": (lambda: ea.class_scores(X[:, None], X[:, None]), "q must hold one query a row"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    call, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()
