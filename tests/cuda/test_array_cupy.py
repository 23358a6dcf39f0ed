"""effcore.array on CuPy arrays against the same functions on NumPy's float64.

Neither torch nor the fixtures of tests/ are needed: where there is no GPU, no CuPy or no CUDA build, everything skips.
"""

from __future__ import annotations

import numpy as np
import pytest

import effcore.array as ea

pytestmark = pytest.mark.cuda

cp = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
pytest.importorskip("effcore._cuda", reason="effcore was built without CUDA", exc_type=ImportError)
try:
    if cp.cuda.runtime.getDeviceCount() == 0:
        pytest.skip("no CUDA device", allow_module_level=True)
except cp.cuda.runtime.CUDARuntimeError:
    pytest.skip("no CUDA device", allow_module_level=True)

DTYPES = ["float32", "float16"]
try:
    import ml_dtypes

    cp.empty(1, ml_dtypes.bfloat16)
    DTYPES.append("bfloat16")
except (ImportError, TypeError, ValueError):
    ml_dtypes = None

# float32 runs on the tensor cores' tf32 or in full; the 16-bit dtypes round P and dS on the way.
TOLERANCE = {"float32": 3e-3, "float16": 3e-3, "bfloat16": 2e-2}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh arrays are NaN, so that an element that a kernel forgets to write is seen."""
    empty = cp.empty

    def poisoned(*args, **kwargs):
        a = empty(*args, **kwargs)
        if a.size:
            cp.cuda.runtime.memsetAsync(a.data.ptr, 0xFF, a.nbytes, cp.cuda.get_current_stream().ptr)
        return a

    monkeypatch.setattr(cp, "empty", poisoned)


def heads(rng, batch, n, tokens, dim, dtype):
    """[B, H, S, D] on the GPU, and the same numbers as float64 in main memory."""
    dtype = np.dtype(getattr(ml_dtypes, dtype)) if dtype == "bfloat16" else np.dtype(dtype)
    host = rng.standard_normal((batch, n, tokens, dim)).astype(dtype)
    return cp.asarray(host), host.astype("f8")


def assert_close(got, exact, dtype, what="out"):
    assert isinstance(got, cp.ndarray), what
    got = cp.asnumpy(got).astype("f8")
    assert got.shape == exact.shape, what
    assert np.all(np.isfinite(got)), f"{what} has elements that were not written"
    error = np.linalg.norm(got - exact) / (np.linalg.norm(exact) + 1e-30)
    assert error <= TOLERANCE[dtype], f"{what}: {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 40])
def test_attention(rng, dim, causal, dtype):
    q, exact_q = heads(rng, 2, 4, 133, dim, dtype)
    k, exact_k = heads(rng, 2, 2, 190, dim, dtype)
    v, exact_v = heads(rng, 2, 2, 190, dim, dtype)
    lengths, first_key = np.array([190, 77], np.int32), np.array([3, 0], np.int32)
    out = ea.attention(q, k, v, causal=causal, lengths=cp.asarray(lengths), first_key=cp.asarray(first_key))
    assert out.dtype == q.dtype
    exact = ea.attention(exact_q, exact_k, exact_v, causal=causal, lengths=lengths, first_key=first_key)
    assert_close(out, exact, dtype)


@pytest.mark.parametrize("keep", ["lse", "probs"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_group(rng, keep, dtype):
    arrays = [heads(rng, 1, 4, 100, 64, dtype), *(heads(rng, 1, 2, 100, 64, dtype) for _ in range(3))]
    douts = [heads(rng, 1, 4, 100, 64, dtype) for _ in range(2)]

    def run(which):
        q, k, v, w = (a[which] for a in arrays)
        dout, dout_w = (g[which] for g in douts)
        out, scores = ea.attention_with_scores(q, k, v, keep=keep, causal=True)
        out_w = ea.attention_from_scores(scores, w)
        dw, delta = ea.attention_from_scores_backward(dout_w, out_w, scores, w)
        return out, out_w, dw, *ea.attention_backward(dout, out, scores, v, consumers=[(dout_w, w, delta)])

    for name, got, exact in zip(("out", "out_w", "dw", "dq", "dk", "dv"), run(0), run(1), strict=True):
        assert_close(got, exact, dtype, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(rng, dtype):
    q, exact_q = heads(rng, 2, 4, 1, 64, dtype)
    k, exact_k = heads(rng, 2, 2, 700, 64, dtype)
    v, exact_v = heads(rng, 2, 2, 700, 64, dtype)
    w, exact_w = heads(rng, 2, 2, 700, 64, dtype)
    lengths = np.array([700, 300], np.int32)
    out, probs = ea.decode_attention(q, k, v, cp.asarray(lengths), return_probs=True)
    exact, exact_probs = ea.decode_attention(exact_q, exact_k, exact_v, lengths, return_probs=True)
    assert_close(out, exact, dtype)
    assert_close(
        ea.decode_from_probs(probs, w, cp.asarray(lengths)), ea.decode_from_probs(exact_probs, exact_w, lengths), dtype
    )


def test_token_major_results(rng):
    q, exact_q = heads(rng, 2, 33, 3, 64, "float16")
    q, exact_q = q.swapaxes(1, 2), exact_q.swapaxes(1, 2)
    out = ea.attention(q, q, q, causal=True)
    assert out.strides[1] < out.strides[2]
    assert_close(out, ea.attention(exact_q, exact_q, exact_q, causal=True), "float16")


def test_runs_on_the_current_stream(rng):
    """The kernel waits for what its stream was given before it: on another stream it would read q too early."""
    q, exact_q = heads(rng, 1, 8, 512, 64, "float16")
    late = cp.zeros_like(q)
    big = cp.ones((4096, 4096), cp.float32)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        for _ in range(8):
            big = big @ big * 1e-4
        late[...] = q
        out = ea.attention(late, late, late)
    stream.synchronize()
    assert_close(out, ea.attention(exact_q, exact_q, exact_q), "float16")


def test_can_be_captured_in_a_graph(rng):
    q, exact_q = heads(rng, 1, 2, 256, 64, "float16")
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        ea.attention(q, q, q)  # first launches load the kernels
        stream.synchronize()
        stream.begin_capture()
        out = ea.attention(q, q, q)
        graph = stream.end_capture()
        graph.launch()
    stream.synchronize()
    assert_close(out, ea.attention(exact_q, exact_q, exact_q), "float16")


def test_memory_comes_from_cupy(rng):
    q, _ = heads(rng, 1, 2, 512, 64, "float16")
    taken = []

    def record(size):
        taken.append(size)
        return cp.get_default_memory_pool().malloc(size)

    with cp.cuda.using_allocator(record):
        ea.attention(q, q, q)
    assert q.nbytes in taken


def test_bad_arguments_are_refused_by_name(rng):
    q, host = heads(rng, 1, 2, 8, 64, "float16")
    with pytest.raises(ValueError, match=r"k is on cpu but q is on cuda:0"):
        ea.attention(q, host.astype("f2"), q)
    with pytest.raises(ValueError, match=r"k is on cuda:0 but q is on cpu$"):
        ea.attention(host.astype("f2"), q, q)
    with pytest.raises(ValueError, match="lengths is on cpu"):
        ea.attention(q, q, q, lengths=np.array([8], np.int32))
    with pytest.raises(ValueError, match=r"q is float64 but float32, bfloat16, float16"):
        ea.attention(*[q.astype(cp.float64)] * 3)
    with pytest.raises(ValueError, match="must be contiguous in its last dimension"):
        ea.attention(q, q[..., ::2], q)
    with pytest.raises(TypeError, match="k must be an array"):
        ea.attention(q, [1], q)


@pytest.mark.skipif(cp.cuda.runtime.getDeviceCount() < 2, reason="one GPU")
def test_a_device_that_is_not_current(rng):
    with cp.cuda.Device(1):
        q, exact_q = heads(rng, 1, 2, 64, 64, "float16")
    with cp.cuda.Device(0):
        out = ea.attention(q, q, q)
        assert out.device.id == 1
    assert_close(out, ea.attention(exact_q, exact_q, exact_q), "float16")


def test_build_info():
    info = ea.build_info()["cuda"]
    assert info["architectures"] and info["dtypes"]
