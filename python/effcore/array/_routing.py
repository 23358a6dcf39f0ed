"""Token movement on arrays; see :mod:`effcore.array`, and :mod:`effcore.ops.routing` for the same on torch tensors."""

from __future__ import annotations

from effcore.array._native import Array, call


class GatheredNorm:
    """Gathered rows and their norm, with what the backward needs.

    Attributes:
        tokens: [B, K, C], the rows as they were.
        normed: [B, K, C].
        mean, rstd: [B, K] float32 (float64 for float64 inputs); no mean after :func:`gather_rms_norm`.
    """

    __slots__ = ("index", "mean", "normed", "rstd", "size", "tokens", "weight")

    def __init__(self, x: Array, index: Array, weight: Array, results: tuple[Array, Array, Array | None, Array]):
        self.tokens, self.normed, self.mean, self.rstd = results
        self.index, self.weight, self.size = index, weight, x.shape[1]

    def __repr__(self) -> str:
        return f"GatheredNorm(tokens={self.tokens.shape}, of={self.size}, dtype={self.tokens.dtype})"


def partition_tokens(scores: Array, keep: int, *, protect: int = 0) -> tuple[Array, Array]:
    """Each row's ``keep`` tokens with the greatest scores, and the others: int32 [B, keep] and [B, N - keep], both ascending.

    Args:
        scores: [B, N]. Ties go to the lower index; NaN comes last, after -inf.
        keep: from 0 to N.
        protect: the first so many tokens always stay and count towards ``keep``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    return call("partition_tokens", scores, scores, keep, protect, argument="scores")  # type: ignore[no-any-return]


def class_scores(q: Array, k: Array, scale: float | None = None) -> Array:
    """The mean over heads of softmax(scale · q kᵀ) of one query: [B, N] float32 (float64 for float64 inputs).

    ``q`` [B, H, 1, D], ``k`` [B, Hkv, N, D]; H is a multiple of Hkv; ``scale`` defaults to D ** -0.5.
    """
    return call("class_scores", q, q, k, scale)


def score_partition(
    q: Array, k: Array, keep: int, *, protect: int = 0, scale: float | None = None
) -> tuple[Array, Array]:
    """:func:`partition_tokens` of :func:`class_scores`, (kept, rest); on the GPU in one launch, or two where few
    rows are shared out among many blocks."""
    return call("score_partition", q, q, k, keep, protect, scale)  # type: ignore[no-any-return]


def gather_tokens(x: Array, index: Array) -> Array:
    """``out[b, i] = x[b, index[b, i]]``: [B, K, C]; ``index`` in any order, repeats allowed."""
    return call("gather_tokens", x, x, index, argument="x")


def gather_tokens_backward(dout: Array, index: Array, tokens: int) -> Array:
    """``dx[b, n]`` = sum of ``dout[b, i]`` over ``index[b, i] == n``: [B, tokens, C], zeros where no index points."""
    return call("gather_tokens_backward", dout, dout, index, tokens, argument="dout")


def separate_tokens(x: Array, index_a: Array, index_b: Array) -> tuple[Array, Array]:
    """The rows of a partition: [B, Ka, C] and [B, Kb, C]. Its backward is :func:`merge_tokens` of the gradients."""
    return call("separate_tokens", x, x, index_a, index_b, argument="x")  # type: ignore[no-any-return]


def merge_tokens(
    a: Array,
    index_a: Array,
    b: Array,
    index_b: Array,
    *,
    residual: Array | None = None,
    residual_a: Array | None = None,
) -> Array:
    """The inverse of :func:`separate_tokens`: [B, Ka + Kb, C] in the original order. Its backward is a separation.

    Args:
        residual: [B, Ka + Kb, C] in the original order, added to the result.
        residual_a: [B, Ka, C], added to ``a``. Sums are rounded once.
    """
    return call("merge_tokens", a, a, index_a, b, index_b, residual, residual_a, argument="a")


def gather_layer_norm(
    x: Array, index: Array, weight: Array, bias: Array | None = None, *, eps: float = 1e-5
) -> GatheredNorm:
    """Gathered rows, and their layer norm with ``weight`` and ``bias`` [C] in x's dtype or float32."""
    results = call("gather_norm", x, x, index, weight, bias, eps, False, argument="x")
    return GatheredNorm(x, index, weight, results)


def gather_rms_norm(x: Array, index: Array, weight: Array, *, eps: float = 1e-6) -> GatheredNorm:
    """Gathered rows, and the same divided by their root mean square: x · rsqrt(mean(x²) + eps) · weight."""
    return GatheredNorm(x, index, weight, call("gather_norm", x, x, index, weight, None, eps, True, argument="x"))


def gather_norm_backward(
    dnormed: Array, gathered: GatheredNorm, dtokens: Array | None = None
) -> tuple[Array, Array, Array]:
    """Gradients ``(dx, dweight, dbias)`` of either gather with a norm; dweight and dbias in float32 (float64).

    Args:
        dnormed, dtokens: gradients of ``gathered.normed`` and, if they were used, of ``gathered.tokens``.
    """
    if not isinstance(gathered, GatheredNorm):
        got = type(gathered).__name__
        raise TypeError(f"effcore.array.gather_norm_backward: gathered must be of GatheredNorm, got {got}")
    g = gathered
    return call(  # type: ignore[no-any-return]
        "gather_norm_backward",
        g.tokens, dnormed, dtokens, g.tokens, g.index, g.weight, g.mean, g.rstd, g.size,
        argument="gathered.tokens",
    )  # fmt: skip
