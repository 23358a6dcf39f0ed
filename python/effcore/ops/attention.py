r"""Softmax attention whose scores or keys and values serve several layers.

Shapes: ``q`` [B, Hq, Sq, D], ``k`` [B, Hkv, Sk, D], ``v`` [B, Hkv, Sk, Dv]; Hq is a multiple of Hkv and query head h reads
kv head h // (Hq // Hkv). Results keep the memory order of ``q`` (head- or token-major). All tensors share one dtype of
float32, bfloat16, float16 (float64 on the CPU as well); sums are taken in float32 or better.

Visibility is the same everywhere: query i of row b sees the keys j with
``first_key[b, i] <= j < lengths[b]``, and with ``causal`` also ``j <= i + lengths[b] - Sq`` (aligned to the end).
``lengths`` is int32 [B] (default Sk); ``first_key`` is int32 [B] or [B, Sq], non-decreasing along Sq (left padding, packed
documents, sliding windows). Both stay on the device. A query that sees no key gives zeros, even beside queries that see NaN;
keys and values in padding never count, NaN or not.

Cross-layer sharing (EPAS, arXiv 2601.19089; ECHO-LLaMA, 2505.17331) is exact: see docs/ops.md for the group gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effcore.ops import _attention_autograd as _autograd
from effcore.ops import _attention_plan as _plan
from effcore.ops._attention_autograd import KEEP_LSE, KEEP_PROBS

__all__ = [
    "SharedKV",
    "SharedScores",
    "attention",
    "attention_from_scores",
    "attention_shared_kv",
    "attention_with_scores",
    "decode_attention",
    "decode_from_probs",
    "explain_keep",
    "plan_keep",
    "set_probs_budget",
    "share_kv",
]

_budget_bytes: int | None = None  # None: the default of the device


class SharedScores:
    """The attention probabilities of a layer group's owner, for exactly one consumer layer.

    A plain object with slots, and no tuple or dataclass, on purpose: FSDP2 and other wrappers cast every floating tensor
    that they find inside containers, and a log-sum-exp in bfloat16 is a wrong probability.
    """

    __slots__ = (
        "causal",
        "delta",
        "dout_slot",
        "first_key",
        "k",
        "lengths",
        "lse",
        "probs",
        "q",
        "scale",
        "use",
        "value_slot",
    )

    q: Tensor
    k: Tensor
    lse: Tensor
    probs: Tensor
    delta: Tensor
    dout_slot: Tensor
    value_slot: Tensor
    use: Tensor
    lengths: Tensor | None
    first_key: Tensor | None
    causal: bool
    scale: float | None

    _TENSORS = ("q", "k", "lse", "probs", "delta", "dout_slot", "value_slot", "use")

    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        lengths: Tensor | None = None,
        first_key: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
    ):
        self.q, self.k, self.lse, self.probs, self.delta, self.dout_slot, self.value_slot, self.use = tensors
        self.lengths, self.first_key, self.causal, self.scale = lengths, first_key, causal, scale

    def tensors(self) -> tuple[Tensor, ...]:
        """The differentiable part as a flat tuple, for frameworks that only see positional tensors (reentrant
        checkpointing, pipeline stages). ``SharedScores(tensors, causal=..., ...)`` puts it together again."""
        return (self.q, self.k, self.lse, self.probs, self.delta, self.dout_slot, self.value_slot, self.use)

    def __repr__(self) -> str:
        kept = "probs" if self.probs.dim() == 3 else "lse"
        return f"SharedScores(keep={kept!r}, q={tuple(self.q.shape)}, k={tuple(self.k.shape)}, causal={self.causal})"


class SharedKV:
    """Keys and values of one layer (after RoPE), for any number of consumer layers. Their gradients add up in float32, from the
    layer that used them last to the first: its slots are those of the layer that used it last."""

    __slots__ = ("k", "k_slot", "v", "v_slot")

    def __init__(self, k: Tensor, v: Tensor, k_slot: Tensor, v_slot: Tensor):
        self.k, self.v, self.k_slot, self.v_slot = k, v, k_slot, v_slot

    def __repr__(self) -> str:
        return f"SharedKV(k={tuple(self.k.shape)}, v={tuple(self.v.shape)}, dtype={self.k.dtype})"


class DecodeProbs:
    """The probabilities of one decoding step: weights in the inputs' dtype, one float32 scale per chunk of keys and head."""

    __slots__ = ("first_key", "scales", "weights")

    def __init__(self, weights: Tensor, scales: Tensor, first_key: Tensor | None):
        self.weights, self.scales, self.first_key = weights, scales, first_key


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, floating tensors (but float64) are cast to its dtype, as torch does for its own attention."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    lengths: Tensor | None = None,
    first_key: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v over the visible keys. Differentiable (once) in q, k and v.

    Args:
        q: [B, Hq, Sq, D], D from 1 to 256; float32, bfloat16, float16, and on the CPU float64.
        k: [B, Hkv, Sk, D], Hq a multiple of Hkv, of q's dtype.
        v: [B, Hkv, Sk, Dv], Dv from 1 to 256, of q's dtype.
        causal: query i sees the keys up to ``i + lengths[b] - Sq``.
        scale: of the scores; default D ** -0.5.
        lengths: int32 [B], how many of a row's keys are valid; default Sk. On CUDA values out of range are clamped.
        first_key: int32 [B] or [B, Sq], the first key that a row or query sees; default 0.

    Returns:
        [B, Hq, Sq, Dv] in q's dtype and memory order; zeros where a query sees no key.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    q, k, v = _autocast(q, k, v)
    return _autograd.attention(q, k, v, lengths, first_key, causal, scale)[0]


def attention_with_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    consumers: int = 1,
    keep: str = "auto",
    causal: bool = False,
    scale: float | None = None,
    lengths: Tensor | None = None,
    first_key: Tensor | None = None,
) -> tuple[Tensor, tuple[SharedScores, ...]]:
    """Attention of a layer group's owner, and its probabilities for ``consumers`` further layers (EPAS, arXiv 2601.19089).

    Args:
        q, k, v, causal, scale, lengths, first_key: as in :func:`attention`.
        consumers: layers that will call :func:`attention_from_scores`, each with its own element of the result. One that
            is left unused costs nothing and changes no gradient; one that is used twice is an error (on the CPU an
            exception in the backward, on CUDA gradients of NaN).
        keep: ``"lse"`` keeps the log-sum-exp and recomputes q kᵀ in every consumer; ``"probs"`` keeps the probabilities
            in the inputs' dtype (the invisible half of a causal layer is not stored), which consumers read (on Hopper up to
            head_dim 64 their backward alone, as recomputing is faster in the forward); ``"auto"`` asks :func:`plan_keep`.

    Returns:
        ``out`` [B, Hq, Sq, Dv], and a tuple of ``consumers`` :class:`SharedScores`. Differentiable (once) in q, k and v.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    q, k, v = _autocast(q, k, v)
    if keep == "auto":
        keep = plan_keep(q, k, causal=causal, consumers=consumers)
    elif keep not in ("lse", "probs"):
        raise ValueError(f"effcore.attention_with_scores: keep must be 'lse', 'probs' or 'auto', got {keep!r}")
    code = KEEP_PROBS if keep == "probs" else KEEP_LSE
    out, lse, probs, delta, douts, values, uses = _autograd.attention_with_scores(
        q, k, v, lengths, first_key, causal, scale, consumers, code
    )
    # The consumers recompute from q and k but send no gradient to them: the owner's backward does that, once.
    q, k = q.detach(), k.detach()
    shared = tuple(
        SharedScores(
            (q, k, lse, probs, delta, dout, value, use),
            lengths=lengths,
            first_key=first_key,
            causal=causal,
            scale=scale,
        )
        for dout, value, use in zip(douts, values, uses, strict=True)
    )
    return out, shared


def attention_from_scores(scores: SharedScores, v: Tensor) -> Tensor:
    """A consumer layer of a QK-sharing group: the owner's probabilities times its own values (EPAS, arXiv 2601.19089).

    Args:
        scores: one element of what :func:`attention_with_scores` returned, for this layer alone.
        v: [B, Hkv, Sk, Dv], with the owner's Hkv, Sk and dtype.

    Returns:
        [B, Hq, Sq, Dv]. Differentiable in v, and in the owner's q and k by the owner's backward.

    Raises:
        TypeError: ``scores`` is no SharedScores.
        ValueError: v does not fit the owner's shapes or dtype.
    """
    if not isinstance(scores, SharedScores):
        raise TypeError(f"effcore.attention_from_scores: scores must be a SharedScores, got {type(scores).__name__}")
    s = scores
    v = v.to(s.q.dtype) if torch.is_autocast_enabled(v.device.type) else v
    return _autograd.attention_from_scores(
        *s.tensors()[:2], v, *s.tensors()[2:], s.lengths, s.first_key, s.causal, s.scale
    )


def share_kv(k: Tensor, v: Tensor) -> SharedKV:
    """Keys [B, Hkv, Sk, D] and values [B, Hkv, Sk, Dv] for any number of layers.

    The consumers' dK and dV are summed in float32 and rounded once, in the first consumer's backward.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    k, v = _autocast(k, v)
    return SharedKV(k.detach(), v.detach(), *_autograd.share_kv(k, v))


def attention_shared_kv(
    q: Tensor,
    shared: SharedKV,
    *,
    causal: bool = False,
    scale: float | None = None,
    lengths: Tensor | None = None,
    first_key: Tensor | None = None,
) -> Tensor:
    """Attention of one more layer to shared keys and values (ECHO-LLaMA, arXiv 2505.17331).

    Args:
        q: [B, Hq, Sq, D].
        shared: what :func:`share_kv` returned.
        causal, scale, lengths, first_key: as in :func:`attention`.

    Returns:
        [B, Hq, Sq, Dv]. Differentiable in q, and in the shared k and v, whose gradients add up over the layers.

    Raises:
        TypeError: ``shared`` is no SharedKV.
        ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(shared, SharedKV):
        raise TypeError(f"effcore.attention_shared_kv: shared must be a SharedKV, got {type(shared).__name__}")
    q = q.to(shared.k.dtype) if torch.is_autocast_enabled(q.device.type) else q
    out, _, k_slot, v_slot = _autograd.attention_shared_kv(
        q, shared.k, shared.v, shared.k_slot, shared.v_slot, lengths, first_key, causal, scale
    )
    if k_slot.requires_grad:  # the next layer's sums of dK and dV pass through this one's backward
        shared.k_slot, shared.v_slot = k_slot, v_slot
    return out


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    first_key: Tensor | None = None,
    return_probs: bool = False,
) -> Tensor | tuple[Tensor, DecodeProbs]:
    """One new token a row against a padded cache: softmax(scale · q kᵀ) v. Not differentiable.

    Args:
        q: [B, Hq, 1, D].
        k, v: [B, Hkv, S, D] and [B, Hkv, S, Dv].
        lengths: int32 [B], how many of a row's keys are valid.
        scale, first_key: as in :func:`attention`.
        return_probs: also return the probabilities, for :func:`decode_from_probs` of the layers that share them.

    Returns:
        [B, Hq, 1, Dv] in q's dtype, or that and the probabilities.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    out, weights, scales = _autograd.decode_attention(q, k, v, lengths, first_key, scale, return_probs)
    return (out, DecodeProbs(weights, scales, first_key)) if return_probs else out


def decode_from_probs(probs: DecodeProbs, v: Tensor, lengths: Tensor) -> Tensor:
    """The next layer of a QK-sharing group while decoding: reads the probabilities and its own values, no keys.

    Args:
        probs: of the owner's :func:`decode_attention` of the same step.
        v: the layer's cache of values, [B, Hkv, S, Dv].
        lengths: int32 [B], as the owner had them.

    Returns:
        [B, Hq, 1, Dv]. Not differentiable.

    Raises:
        TypeError: ``probs`` is no DecodeProbs.
        ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(probs, DecodeProbs):
        raise TypeError(
            f"effcore.decode_from_probs: probs must be a DecodeProbs of decode_attention, got {type(probs).__name__}"
        )
    return _autograd.decode_from_probs(probs.weights, probs.scales, v, lengths, probs.first_key)


def set_probs_budget(num_bytes: int) -> None:
    """Bytes of kept probabilities that ``keep="auto"`` may choose for one layer group.

    Without it: 2 GiB on the CPU, one part in 32 of a GPU's memory.
    """
    global _budget_bytes
    if num_bytes < 0:
        raise ValueError(f"effcore.set_probs_budget: bytes must not be negative, got {num_bytes}")
    _budget_bytes = num_bytes


def plan_keep(q: Tensor, k: Tensor, *, causal: bool, consumers: int) -> str:
    """What ``keep="auto"`` means: ``"lse"`` or ``"probs"``; :func:`explain_keep` says why.

    A function of shapes, dtype, the device's kernels and the budget alone, so that fake tensors and checkpoint recomputation
    decide alike. On the CPU reading P costs less than computing it wherever it fits the budget; on a GPU a measured table
    decides (docs/attention-speed.md).

    Args:
        q: [B, Hq, Sq, D], of which shape, dtype and device count; k: [B, Hkv, Sk, D].
        consumers: layers that would use the scores, besides the first.
    """
    return _plan.choose(*_keep_question(q, k, causal, consumers))


def explain_keep(q: Tensor, k: Tensor, *, causal: bool, consumers: int) -> str:
    """The reason of :func:`plan_keep` in words."""
    return _plan.explain(*_keep_question(q, k, causal, consumers))


def _keep_question(q: Tensor, k: Tensor, causal: bool, consumers: int) -> tuple[str, int, int, int, int]:
    batch, heads, queries, head_dim = q.shape
    num_bytes = batch * heads * _autograd.probs_elements(queries, k.shape[2], causal) * q.element_size()
    device = q.device.type, q.device.index
    budget = _plan.default_budget(*device) if _budget_bytes is None else _budget_bytes
    return _plan.kernels_of(*device), head_dim, consumers, num_bytes, budget
