r"""effcore's attention on NumPy arrays (CPU) and CuPy arrays (GPU), without torch.

The same kernels as ``effcore.ops.attention``, reached through DLPack: nothing is copied, and importing this module imports
neither torch nor CuPy. There is no autograd here: the backward functions are called by name.

Shapes: ``q`` [B, Hq, Sq, D], ``k`` [B, Hkv, Sk, D], ``v`` [B, Hkv, Sk, Dv]; Hq is a multiple of Hkv and query head h reads
kv head h // (Hq // Hkv). Any strides with a contiguous last dimension; read-only arrays are welcome. All arrays of one call
share a dtype of float32, float16, bfloat16 (``ml_dtypes.bfloat16``), or float64 (NumPy alone), and a device. Results are
fresh arrays of the same kind; out, dq, dk and dv in the memory order (head- or token-major) of q, q, k and v.

Visibility is the same everywhere: query i of row b sees the keys j with ``first_key[b, i] <= j < lengths[b]``, and with
``causal`` also ``j <= i + lengths[b] - Sq`` (aligned to the end). ``lengths`` is int32 [B] (default Sk); ``first_key`` is
int32 [B] or [B, Sq], non-decreasing along Sq. A query that sees no key gives zeros.

On the GPU the kernels run on CuPy's current stream, their scratch memory comes from CuPy's allocator, and nothing
synchronises. On the CPU they run on :func:`set_num_threads` threads and release the GIL.

A bad argument is a ``ValueError`` or ``TypeError`` that names the argument, what was expected and what came.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy

from effcore import _core

__all__ = [
    "AttentionScores",
    "DecodeProbs",
    "attention",
    "attention_backward",
    "attention_from_scores",
    "attention_from_scores_backward",
    "attention_with_scores",
    "build_info",
    "decode_attention",
    "decode_from_probs",
    "get_num_threads",
    "set_num_threads",
]

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray; CuPy is not a dependency


class AttentionScores:
    """The attention probabilities P = softmax(scale · q kᵀ) of one layer, for any number of others and for the backward.

    Attributes:
        lse: log-sum-exp of each row of scores [B, Hq, Sq], float32 (float64 for float64 inputs); -inf where a query sees
            no key.
        probs: P in the inputs' dtype, packed in tiles of 64 x 64, or None where P is recomputed from q, k and lse.
    """

    __slots__ = ("causal", "first_key", "k", "lengths", "lse", "probs", "q", "scale")

    def __init__(
        self,
        q: Array,
        k: Array,
        lse: Array,
        probs: Array | None,
        lengths: Array | None,
        first_key: Array | None,
        causal: bool,
        scale: float | None,
    ):
        self.q, self.k, self.lse, self.probs = q, k, lse, probs
        self.lengths, self.first_key, self.causal, self.scale = lengths, first_key, causal, scale

    def __repr__(self) -> str:
        kept = "lse" if self.probs is None else "probs"
        return f"AttentionScores(keep={kept!r}, q={self.q.shape}, k={self.k.shape}, causal={self.causal})"


class DecodeProbs:
    """The probabilities of one decoding step: P = weights · scales, one scale for each head and chunk of 256 keys.

    Attributes:
        weights: [B, Hq, Sk] in the inputs' dtype, 0 at keys that are not seen.
        scales: [B, Hq, ceil(Sk / 256)] float32 (float64 for float64 inputs).
    """

    __slots__ = ("first_key", "scales", "weights")

    def __init__(self, weights: Array, scales: Array, first_key: Array | None):
        self.weights, self.scales, self.first_key = weights, scales, first_key

    def __repr__(self) -> str:
        return f"DecodeProbs(weights={self.weights.shape}, dtype={self.weights.dtype})"


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    scale: float | None = None,
    lengths: Array | None = None,
    first_key: Array | None = None,
) -> Array:
    """softmax(scale · q kᵀ) v over the visible keys: [B, Hq, Sq, Dv]. ``scale`` defaults to D ** -0.5.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    return _call("attention", q, q, k, v, lengths, first_key, causal, scale, False)[0]


def attention_with_scores(
    q: Array,
    k: Array,
    v: Array,
    *,
    keep: str = "lse",
    causal: bool = False,
    scale: float | None = None,
    lengths: Array | None = None,
    first_key: Array | None = None,
) -> tuple[Array, AttentionScores]:
    """:func:`attention`, and its probabilities for further layers and for the backward.

    Args:
        keep: ``"lse"`` keeps the log-sum-exp, from which q kᵀ is recomputed; ``"probs"`` also keeps the probabilities in the
            inputs' dtype (the invisible half of a causal layer is not stored).
    """
    if keep not in ("lse", "probs"):
        raise ValueError(f"effcore.array.attention_with_scores: keep must be 'lse' or 'probs', got {keep!r}")
    out, lse, probs = _call("attention", q, q, k, v, lengths, first_key, causal, scale, keep == "probs")
    return out, AttentionScores(q, k, lse, probs, lengths, first_key, causal, scale)


def attention_from_scores(scores: AttentionScores, v: Array) -> Array:
    """A further layer that shares another's q and k: P v with its own ``v`` [B, Hkv, Sk, Dv] (EPAS, arXiv 2601.19089)."""
    s = _expect("attention_from_scores", "scores", scores, AttentionScores)
    return _call("attention_from_scores", s.q, s.q, s.k, v, s.lse, s.probs, s.lengths, s.first_key, s.causal, s.scale)


def attention_from_scores_backward(dout: Array, out: Array, scores: AttentionScores, v: Array) -> tuple[Array, Array]:
    """The sharing layer's part of the backward: ``(dv, delta)``.

        dv = Pᵀ dout,   delta = rowsum(dout ∘ out) [B, Hq, Sq]

    Its share of dq and dk is computed once for the whole group, in :func:`attention_backward`.
    """
    s = _expect("attention_from_scores_backward", "scores", scores, AttentionScores)
    return _call(
        "attention_from_scores_backward",
        s.q, dout, out, s.q, s.k, v, s.lse, s.probs, s.lengths, s.first_key, s.causal, s.scale,
    )  # fmt: skip


def attention_backward(
    dout: Array,
    out: Array,
    scores: AttentionScores,
    v: Array,
    *,
    consumers: Sequence[tuple[Array, Array, Array]] = (),
    float32_kv: bool = False,
) -> tuple[Array, Array, Array]:
    """Gradients ``(dq, dk, dv)`` of an attention layer, and of all layers that shared its probabilities.

        dP = Σ_l dout_l v_lᵀ,   delta = Σ_l rowsum(dout_l ∘ out_l),   dS = P ∘ (dP - delta)
        dq = scale · dS k,   dk = scale · dSᵀ q,   dv = Pᵀ dout

    The sums run over this layer and its consumers; without consumers this is the ordinary backward of attention.

    Args:
        dout, out: gradient and value of this layer's output, [B, Hq, Sq, Dv].
        scores: what :func:`attention_with_scores` returned with ``out``.
        v: this layer's values.
        consumers: ``(dout, v, delta)`` of each layer that called :func:`attention_from_scores`, with the delta of
            :func:`attention_from_scores_backward`.
        float32_kv: dk and dv in float32 instead of the inputs' dtype, for callers that add those of several layers up.
    """
    s = _expect("attention_backward", "scores", scores, AttentionScores)
    douts, values, delta = [dout], [v], None
    for consumer in consumers:
        if len(consumer) != 3:
            raise ValueError(
                f"effcore.array.attention_backward: consumers must hold (dout, v, delta), got {len(consumer)} arrays"
            )
        douts.append(consumer[0])
        values.append(consumer[1])
        delta = consumer[2] if delta is None else delta + consumer[2]
    return _call(
        "attention_backward",
        s.q, douts, values, out, s.q, s.k, s.lse, s.probs, delta, s.lengths, s.first_key, s.causal, s.scale, float32_kv,
    )  # fmt: skip


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    *,
    scale: float | None = None,
    first_key: Array | None = None,
    return_probs: bool = False,
) -> Array | tuple[Array, DecodeProbs]:
    """One new token a row, ``q`` [B, Hq, 1, D], against a padded cache of which ``lengths`` [B] keys are valid.

    With ``return_probs`` also the probabilities, for :func:`decode_from_probs` of the layers that share them.
    """
    out, weights, scales = _call("decode_attention", q, q, k, v, lengths, first_key, scale, return_probs)
    return (out, DecodeProbs(weights, scales, first_key)) if return_probs else out


def decode_from_probs(probs: DecodeProbs, v: Array, lengths: Array) -> Array:
    """The next layer of a sharing group while decoding: reads the probabilities and its own values, no keys."""
    p = _expect("decode_from_probs", "probs", probs, DecodeProbs)
    return _call("decode_from_probs", p.weights, p.weights, p.scales, v, lengths, p.first_key)


def set_num_threads(count: int) -> None:
    """Threads of the CPU functions, the calling one included.

    At first ``OMP_NUM_THREADS``, or else as many as the processors that this process may use. The results do not depend on
    it. Calls that overlap in time do not share the threads: the first has them, the others run on their caller's.
    """
    _core.set_num_threads(count)


def get_num_threads() -> int:
    """What :func:`set_num_threads` set."""
    return _core.num_threads()


def build_info() -> dict[str, Any]:
    """Version, compiler, instruction set in use, threads, dtypes, and whether the CUDA kernels are installed (``cuda``: the
    GPU architectures that they were compiled for, or None)."""
    info = _core.build_info()
    try:
        from effcore import _cuda
    except ImportError:
        return {**info, "cuda": None}
    return {**info, "cuda": _cuda.build_info()}


def _expect(function: str, argument: str, value: Any, wanted: type) -> Any:
    if not isinstance(value, wanted):
        got = type(value).__name__
        raise TypeError(f"effcore.array.{function}: {argument} must be of {wanted.__name__}, got {got}")
    return value


def _call(function: str, leader: Array, *arguments: Any) -> Any:
    """Runs a native function where ``leader`` (q, or what stands for it) lives."""
    if isinstance(leader, numpy.ndarray):
        return getattr(_core, function)(numpy.empty, 0, *arguments)
    cupy = sys.modules.get("cupy")  # whoever holds a CuPy array has imported it
    if cupy is not None and isinstance(leader, cupy.ndarray):
        native = _cuda_function(function)
        with leader.device:  # allocations and the current stream are a matter of the current device
            stream = cupy.cuda.get_current_stream().ptr
            return native(cupy.empty, stream or 1, *arguments)  # 1 is how DLPack writes the default stream
    kind = f"{type(leader).__module__}.{type(leader).__qualname__}".removeprefix("builtins.")
    hint = "; torch tensors go to effcore.ops.attention" if kind.startswith("torch.") else ""
    raise TypeError(f"effcore.array.{function}: q must be a NumPy or CuPy array, got {kind}{hint}")


def _cuda_function(function: str) -> Callable[..., Any]:
    try:
        from effcore import _cuda
    except ImportError as error:
        raise RuntimeError(
            f"effcore.array.{function}: q is on a GPU, but effcore was installed without its CUDA kernels ({error}); "
            "install it where nvcc and a CUDA torch are found, or with EFFCORE_CUDA=ON"
        ) from error
    return getattr(_cuda, function)
