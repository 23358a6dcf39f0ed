"""The attention family on arrays; see :mod:`effcore.array`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effcore.array._native import Array, call


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
    return call("attention", q, q, k, v, lengths, first_key, causal, scale, False)[0]


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
    """``(out, scores)``: :func:`attention`, and its probabilities for further layers and for the backward.

    Args:
        keep: ``"lse"`` keeps the log-sum-exp, from which q kᵀ is recomputed; ``"probs"`` also keeps the probabilities in the
            inputs' dtype (the invisible half of a causal layer is not stored).
    """
    if keep not in ("lse", "probs"):
        raise ValueError(f"effcore.array.attention_with_scores: keep must be 'lse' or 'probs', got {keep!r}")
    out, lse, probs = call("attention", q, q, k, v, lengths, first_key, causal, scale, keep == "probs")
    return out, AttentionScores(q, k, lse, probs, lengths, first_key, causal, scale)


def attention_from_scores(scores: AttentionScores, v: Array) -> Array:
    """A further layer that shares another's q and k: P v with its own ``v`` [B, Hkv, Sk, Dv] (EPAS, arXiv 2601.19089)."""
    s = _expect("attention_from_scores", "scores", scores, AttentionScores)
    return call("attention_from_scores", s.q, s.q, s.k, v, s.lse, s.probs, s.lengths, s.first_key, s.causal, s.scale)


def attention_from_scores_backward(dout: Array, out: Array, scores: AttentionScores, v: Array) -> tuple[Array, Array]:
    """The sharing layer's part of the backward: ``(dv, delta)``.

        dv = Pᵀ dout,   delta = rowsum(dout ∘ out) [B, Hq, Sq]

    Its share of dq and dk is computed once for the whole group, in :func:`attention_backward`.
    """
    s = _expect("attention_from_scores_backward", "scores", scores, AttentionScores)
    return call(
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
    return call(
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
    out, weights, scales = call("decode_attention", q, q, k, v, lengths, first_key, scale, return_probs)
    return (out, DecodeProbs(weights, scales, first_key)) if return_probs else out


def decode_from_probs(probs: DecodeProbs, v: Array, lengths: Array) -> Array:
    """The next layer of a sharing group while decoding: reads the probabilities and its own values, no keys."""
    p = _expect("decode_from_probs", "probs", probs, DecodeProbs)
    return call("decode_from_probs", p.weights, p.weights, p.scales, v, lengths, p.first_key)


def _expect(function: str, argument: str, value: Any, wanted: type) -> Any:
    if not isinstance(value, wanted):
        got = type(value).__name__
        raise TypeError(f"effcore.array.{function}: {argument} must be of {wanted.__name__}, got {got}")
    return value
