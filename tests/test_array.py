"""effcore.array against the formulas in NumPy's float64."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading

import numpy as np
import pytest

import effcore.array as ea

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

DTYPES = ["float32", "float64", "float16"] + (["bfloat16"] if ml_dtypes else [])
# Roundings of the dtype, with room for sums: errors are relative to the norm of the exact result.
TOLERANCE = {"float32": 2e-6, "float64": 1e-13, "float16": 2e-3, "bfloat16": 1.2e-2}


def dtype_of(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh arrays are NaN, so that an element that a kernel forgets to write is seen."""
    empty = np.empty

    def poisoned(*args, **kwargs):
        a = empty(*args, **kwargs)
        a.view(np.uint8).fill(0xFF)
        return a

    monkeypatch.setattr(np, "empty", poisoned)


def heads(rng, batch, n, tokens, dim, dtype="float32", layout="head"):
    """[B, H, S, D] in one of the memory orders that occur."""
    if layout == "token":
        return rng.standard_normal((batch, tokens, n, dim)).astype(dtype_of(dtype)).swapaxes(1, 2)
    if layout == "sliced":
        return rng.standard_normal((batch, n, tokens, dim + 3)).astype(dtype_of(dtype))[..., 1 : dim + 1]
    if layout == "reversed":  # negative strides
        return rng.standard_normal((batch, n, tokens, dim)).astype(dtype_of(dtype))[:, ::-1, ::-1]
    return rng.standard_normal((batch, n, tokens, dim)).astype(dtype_of(dtype))


class Exact:
    """softmax(scale q kᵀ) v and its gradients in float64, as written in the docstrings of effcore.array."""

    def __init__(self, q, k, *, causal=False, scale=None, lengths=None, first_key=None):
        self.q, self.k = q.astype("f8"), k.astype("f8")
        batch, self.heads, queries, dim = q.shape
        self.groups, keys = k.shape[1], k.shape[2]
        self.scale = dim**-0.5 if scale is None else scale
        end = np.full(batch, keys) if lengths is None else np.asarray(lengths)
        i, j = np.arange(queries)[None, :, None], np.arange(keys)[None, None, :]
        seen = np.broadcast_to(j < end[:, None, None], (batch, queries, keys))
        if causal:
            seen = seen & (j <= i + end[:, None, None] - queries)
        if first_key is not None:
            first = first_key if first_key.ndim == 2 else first_key[:, None]
            seen = seen & (j >= first[:, :, None])
        scores = np.where(seen[:, None], self.scale * self.q @ self.per_query_head(self.k).swapaxes(2, 3), -np.inf)
        top = scores.max(-1, keepdims=True, initial=-np.inf)
        weights = np.where(seen[:, None], np.exp(scores - np.where(np.isfinite(top), top, 0)), 0.0)
        total = weights.sum(-1, keepdims=True)
        self.probs = weights / np.where(total == 0, 1, total)
        with np.errstate(divide="ignore"):
            self.lse = (top + np.log(total))[..., 0] if keys else np.full((batch, self.heads, queries), -np.inf)

    def per_query_head(self, x):
        return np.repeat(x.astype("f8"), self.heads // self.groups, axis=1) if self.heads else x.astype("f8")

    def per_kv_head(self, x):
        batch, _, tokens, dim = x.shape
        return x.reshape(batch, self.groups, self.heads // self.groups, tokens, dim).sum(2)

    def out(self, v):
        return self.probs @ self.per_query_head(v)

    def gradients(self, douts, values):
        """dq, dk of the layers that share the probabilities, and each layer's dv."""
        douts = [g.astype("f8") for g in douts]
        d_probs = sum(g @ self.per_query_head(v).swapaxes(2, 3) for g, v in zip(douts, values, strict=True))
        d_scores = self.probs * (d_probs - (d_probs * self.probs).sum(-1, keepdims=True)) * self.scale
        dq = d_scores @ self.per_query_head(self.k)
        dk = self.per_kv_head(d_scores.swapaxes(2, 3) @ self.q)
        return dq, dk, [self.per_kv_head(self.probs.swapaxes(2, 3) @ g) for g in douts]


def assert_close(got, exact, dtype, what="out", factor=1.0):
    assert got.shape == exact.shape, what
    assert np.all(np.isfinite(got.astype("f8"))), f"{what} has elements that were not written"
    error = np.linalg.norm(got.astype("f8") - exact)
    assert error <= factor * TOLERANCE[dtype] * (np.linalg.norm(exact) + 1e-30), f"{what}: {error:.2e}"


# (batch, heads, kv_heads, queries, keys, head_dim, value_dim)
SHAPES = [
    (1, 2, 2, 64, 64, 64, 64),
    (2, 4, 2, 33, 65, 24, 17),
    (1, 6, 1, 1, 100, 128, 128),
    (2, 3, 3, 7, 5, 1, 3),
    (1, 1, 1, 130, 257, 80, 96),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(rng, shape, causal, dtype):
    b, h, g, sq, sk, d, dv = shape
    q, k, v = heads(rng, b, h, sq, d, dtype), heads(rng, b, g, sk, d, dtype), heads(rng, b, g, sk, dv, dtype)
    out, scores = ea.attention_with_scores(q, k, v, causal=causal)
    assert isinstance(out, np.ndarray) and out.dtype == q.dtype
    exact = Exact(q, k, causal=causal)
    assert_close(out, exact.out(v), dtype)
    visible = np.isfinite(exact.lse)
    np.testing.assert_allclose(
        scores.lse[visible], exact.lse[visible], rtol=1e-5, atol=1e-5 if dtype != "float64" else 1e-12
    )
    assert np.all(np.isneginf(scores.lse[~visible]))
    assert scores.lse.dtype == ("float64" if dtype == "float64" else "float32")


@pytest.mark.parametrize("layout", ["head", "token", "sliced", "reversed"])
def test_strides_are_taken_as_they_are(rng, layout):
    q, k, v = (heads(rng, 2, 3, 19, 24, layout=layout) for _ in range(3))
    out = ea.attention(q, k, v, causal=True)
    assert_close(out, Exact(q, k, causal=True).out(v), "float32")
    assert (out.strides[1] < out.strides[2]) == (layout == "token")


def test_lengths_first_key_and_scale(rng):
    q, k, v = heads(rng, 3, 4, 9, 16), heads(rng, 3, 2, 21, 16), heads(rng, 3, 2, 21, 16)
    lengths = np.array([21, 0, 13], np.int32)
    windows = np.maximum(np.arange(9)[None] + lengths[:, None] - 9 - 3, 0).astype(np.int32)
    padding = np.array([4, 0, 13], np.int32)
    for first_key in (None, windows, padding):
        options = {"causal": True, "scale": 0.3, "lengths": lengths, "first_key": first_key}
        out = ea.attention(q, k, v, **options)
        assert_close(out, Exact(q, k, **options).out(v), "float32")
        assert not out[1].any()


@pytest.mark.parametrize("keep", ["lse", "probs"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_group(rng, keep, dtype):
    q, k = heads(rng, 2, 4, 70, 24, dtype, "token"), heads(rng, 2, 2, 90, 24, dtype)
    values = [heads(rng, 2, 2, 90, 20, dtype) for _ in range(3)]
    douts = [heads(rng, 2, 4, 70, 20, dtype) for _ in range(3)]
    lengths = np.array([90, 31], np.int32)
    out, scores = ea.attention_with_scores(q, k, values[0], keep=keep, causal=True, lengths=lengths)
    assert (scores.probs is not None) == (keep == "probs")
    exact = Exact(q, k, causal=True, lengths=lengths)
    dq, dk, dvs = exact.gradients(douts, values)
    consumers = []
    for dout, v, dv in zip(douts[1:], values[1:], dvs[1:], strict=True):
        shared = ea.attention_from_scores(scores, v)
        assert_close(shared, exact.out(v), dtype)
        got, delta = ea.attention_from_scores_backward(dout, shared, scores, v)
        assert_close(got, dv, dtype, "dv of a consumer")
        consumers.append((dout, v, delta))
    got = ea.attention_backward(douts[0], out, scores, values[0], consumers=consumers)
    for name, a, b in zip(("dq", "dk", "dv"), got, (dq, dk, dvs[0]), strict=True):
        assert_close(a, b, dtype, name, factor=3)
    assert got[0].strides[1] < got[0].strides[2]  # token-major, like q


def test_plain_backward_and_float32_gradients_of_keys(rng):
    q, k, v = (heads(rng, 1, 2, 40, 32, "float16") for _ in range(3))
    dout = heads(rng, 1, 2, 40, 32, "float16")
    out, scores = ea.attention_with_scores(q, k, v)
    dq, dk, dv = ea.attention_backward(dout, out, scores, v, float32_kv=True)
    assert (dq.dtype, dk.dtype, dv.dtype) == (np.float16, np.float32, np.float32)
    exact_dq, exact_dk, (exact_dv,) = Exact(q, k).gradients([dout], [v])
    assert_close(dq, exact_dq, "float16", "dq", factor=3)
    assert_close(dk, exact_dk, "float16", "dk", factor=3)
    assert_close(dv, exact_dv, "float16", "dv", factor=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(rng, dtype):
    q, k = heads(rng, 3, 4, 1, 64, dtype), heads(rng, 3, 2, 600, 64, dtype)
    v, w = heads(rng, 3, 2, 600, 64, dtype), heads(rng, 3, 2, 600, 32, dtype)
    lengths, first_key = np.array([600, 0, 257], np.int32), np.array([5, 0, 256], np.int32)
    exact = Exact(q, k, lengths=lengths, first_key=first_key)
    out, probs = ea.decode_attention(q, k, v, lengths, first_key=first_key, return_probs=True)
    assert_close(out, exact.out(v), dtype)
    assert probs.weights.shape == (3, 4, 600) and probs.scales.shape == (3, 4, 3)
    assert_close(ea.decode_from_probs(probs, w, lengths), exact.out(w), dtype)
    assert_close(ea.decode_attention(q, k, v, lengths, first_key=first_key), exact.out(v), dtype)


@pytest.mark.parametrize("empty", [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)])
def test_empty_arrays(empty):
    batch, n, queries, keys = empty
    q, k = np.zeros((batch, n, queries, 8), "f"), np.zeros((batch, n, keys, 8), "f")
    out, scores = ea.attention_with_scores(q, k, k)
    assert out.shape == q.shape and not out.any()
    dq, dk, dv = ea.attention_backward(np.ones_like(out), out, scores, k)
    assert not dq.any() and not dk.any() and not dv.any()


def test_read_only_inputs_are_taken(rng):
    q = heads(rng, 1, 1, 4, 8)
    before = ea.attention(q, q, q)
    q.flags.writeable = False
    np.testing.assert_array_equal(ea.attention(q, q, q), before)


def test_results_do_not_depend_on_threads(rng):
    q, k, v = (heads(rng, 2, 3, 150, 32) for _ in range(3))
    before = ea.get_num_threads()
    results = []
    try:
        for count in (1, 2, 7, 3):
            ea.set_num_threads(count)
            assert ea.get_num_threads() == count
            results.append(ea.attention(q, k, v, causal=True))
    finally:
        ea.set_num_threads(before)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_calls_from_many_threads(rng):
    q, k, v = (heads(rng, 1, 4, 120, 32) for _ in range(3))
    expected = ea.attention(q, k, v)
    wrong = []

    def work():
        wrong.extend(i for i in range(20) if not np.array_equal(ea.attention(q, k, v), expected))

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def _in_a_child(pipe):
    q = np.ones((1, 4, 100, 16), "f")
    pipe.send(float(ea.attention(q, q, q).sum()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own():
    q = np.ones((1, 4, 100, 16), "f")
    expected = float(ea.attention(q, q, q).sum())
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_in_a_child, args=(send,))
    child.start()
    assert receive.poll(30), "the child hangs"
    assert receive.recv() == expected
    child.join(30)


def test_torch_is_not_imported():
    code = "import sys, effcore.array; sys.exit('torch' in sys.modules or 'cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_build_info():
    info = ea.build_info()
    assert info["isa"] in ("v2", "v3", "v4", "bf16", "amx", "portable")
    assert {"version", "compiler", "threads", "dtypes", "cuda"} <= info.keys()


def _f(*shape):
    return np.zeros(shape, "f")


Q = _f(2, 4, 5, 8)
REFUSED = {
    "list": (lambda: ea.attention(Q.tolist(), Q, Q), TypeError, "q must be a NumPy or CuPy array, got list"),
    "list of keys": (lambda: ea.attention(Q, [1.0], Q), TypeError, "k must be an array"),
    "rank": (lambda: ea.attention(Q, Q[0], Q), ValueError, "k must have 4 dimensions"),
    "too many dimensions": (lambda: ea.attention(Q, _f(1, 1, 1, 1, 1, 1), Q), ValueError, "k must have at most 5"),
    "dtypes": (lambda: ea.attention(Q, Q.astype("f8"), Q), ValueError, "k is float64 but q is float32"),
    "integers": (lambda: ea.attention(Q.astype("i8"), Q, Q), ValueError, "q is int64 but float32"),
    "complex": (lambda: ea.attention(Q, Q, Q.astype("c8")), ValueError, "v is complex64 but float32"),
    "uint16 is not bfloat16": (lambda: ea.attention(Q.astype("u2"), Q, Q), ValueError, "q is uint16"),
    "byte order": (lambda: ea.attention(Q, Q.astype(">f4"), Q), ValueError, "k of dtype >f4 cannot be used"),
    "objects": (lambda: ea.attention(Q, Q.astype(object), Q), ValueError, "k of dtype object cannot be used"),
    "stride": (lambda: ea.attention(Q, Q[..., ::-1], Q), ValueError, "k must be contiguous in its last dimension"),
    "heads": (lambda: ea.attention(Q, _f(2, 3, 5, 8), _f(2, 3, 5, 8)), ValueError, "q has 4 heads"),
    "tokens": (lambda: ea.attention(Q, Q, _f(2, 4, 6, 8)), ValueError, "v has 6 tokens but k has 5"),
    "head_dim": (lambda: ea.attention(Q, _f(2, 4, 5, 9), Q), ValueError, "k has head dimension 9 but q has 8"),
    "wide": (lambda: ea.attention(*[_f(1, 1, 1, 257)] * 3), ValueError, "q has head dimension 257"),
    "scale": (lambda: ea.attention(Q, Q, Q, scale=float("nan")), ValueError, "scale must be finite"),
    "scale type": (lambda: ea.attention(Q, Q, Q, scale="1"), TypeError, "incompatible function arguments"),
    "lengths dtype": (
        lambda: ea.attention(Q, Q, Q, lengths=np.array([5, 5])), ValueError, "lengths is int64|lengths must be int32",
    ),
    "lengths values": (
        lambda: ea.attention(Q, Q, Q, lengths=np.array([5, 6], "i4")), ValueError, r"lengths\[1\] is 6 but k has 5 tokens",
    ),
    "first_key": (
        lambda: ea.attention(Q, Q, Q, first_key=np.array([[0, 1, 2, 1, 3]] * 2, "i4")), ValueError, "must not decrease",
    ),
    "keep": (lambda: ea.attention_with_scores(Q, Q, Q, keep="all"), ValueError, "keep must be 'lse' or 'probs', got 'all'"),
    "scores": (lambda: ea.attention_from_scores(Q, Q), TypeError, "scores must be of AttentionScores, got ndarray"),
    "probs": (lambda: ea.decode_from_probs(Q, Q, None), TypeError, "probs must be of DecodeProbs, got ndarray"),
    "tokens a row": (
        lambda: ea.decode_attention(Q, Q, Q, np.array([5, 5], "i4")), ValueError, "q must hold one token a row, got 5",
    ),
    "unaligned": (
        lambda: ea.attention(Q, np.zeros(4 * Q.size + 1, "u1")[1:].view("f").reshape(Q.shape), Q),
        ValueError,
        "k is not aligned",
    ),
    "threads": (lambda: ea.set_num_threads(0), ValueError, "count must be 1 to 1024, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_by_name(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("shape, dtype", [((1, 1, 2, 4), "i8"), ((1,) * 6, "f4")])
def test_a_refused_array_is_given_back(shape, dtype):
    array = np.zeros(shape, dtype)
    references = sys.getrefcount(array)
    for _ in range(5):
        with pytest.raises(ValueError):
            ea.attention(array, array, array)
    assert sys.getrefcount(array) == references


def test_a_consumer_of_another_shape_is_refused(rng):
    q = heads(rng, 1, 2, 5, 8)
    out, scores = ea.attention_with_scores(q, q, q)
    with pytest.raises(ValueError, match="v has 4 tokens but k has 5"):
        ea.attention_from_scores(scores, q[:, :, :4])
    with pytest.raises(ValueError, match="dout must have shape"):
        ea.attention_backward(out[:, :, :4], out, scores, q)
    with pytest.raises(ValueError, match="consumers must hold"):
        ea.attention_backward(out, out, scores, q, consumers=[(out, q)])


def test_torch_tensors_are_sent_elsewhere():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"got torch\.Tensor; torch tensors go to effcore\.ops"):
        ea.attention(torch.zeros(1, 1, 1, 8), Q, Q)
