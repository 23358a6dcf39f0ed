"""Attention and its sharing across layers, as formulas in plain torch.

Differentiable by torch's own autograd, in whatever dtype the inputs have. A row that sees no key gives zeros.
"""

import torch
from torch import Tensor


class SharedScores:
    """The probabilities P of a layer group, as a plain tensor of the autograd graph."""

    __slots__ = ("probs",)

    def __init__(self, probs: Tensor):
        self.probs = probs


class SharedKV:
    """Keys and values that several layers attend to."""

    __slots__ = ("k", "v")

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v


def visible(
    batch: int,
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    lengths: Tensor | None = None,
    first_key: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The mask [batch, queries, keys] that ``causal``, ``lengths`` and ``first_key`` describe: True where a key is seen."""
    if lengths is None:
        lengths = torch.full((batch,), keys, dtype=torch.int32, device=device)
    i = torch.arange(queries, device=device)[None, :, None]
    j = torch.arange(keys, device=device)[None, None, :]
    end = lengths.clamp(0, keys)[:, None, None]
    seen = (j < end) & (j >= 0) & (i >= 0)
    if causal:
        seen = seen & (j <= i + end - queries)
    if first_key is not None:
        first = first_key if first_key.dim() == 2 else first_key[:, None].expand(batch, queries)
        seen = seen & (j >= first[:, :, None])
    return seen


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """[B, Hkv, S, D] -> [B, heads, S, D]: each kv head serves ``heads / Hkv`` neighbouring query heads."""
    return x.repeat_interleave(heads // x.shape[1], dim=1) if heads else x


def probabilities(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    lengths: Tensor | None = None,
    first_key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q kᵀ) over the visible keys [B, Hq, Sq, Sk], and the log-sum-exp [B, Hq, Sq] of the scores."""
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    scores = (q @ repeat_kv(k, heads).mT) * scale
    seen = visible(batch, queries, keys, causal=causal, lengths=lengths, first_key=first_key, device=q.device)[:, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, -1) if keys else scores.new_full(scores.shape[:-1], float("-inf"))
    # exp(-inf - -inf) would be NaN: rows without a visible key subtract 0 instead and come out as zeros.
    shift = lse.masked_fill(~seen.any(-1), 0.0)
    probs = torch.exp(scores - shift[..., None]).masked_fill(~seen, 0.0)
    return probs, lse


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
    """softmax(scale q kᵀ + visibility) v; see :func:`effcore.ops.attention.attention`."""
    probs, _ = probabilities(q, k, causal=causal, scale=scale, lengths=lengths, first_key=first_key)
    return attention_from_scores(SharedScores(probs), v)


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
    """The owner of a QK-sharing group: its output, and its probabilities for each consumer."""
    probs, _ = probabilities(q, k, causal=causal, scale=scale, lengths=lengths, first_key=first_key)
    shared = SharedScores(probs)
    return attention_from_scores(shared, v), (shared,) * consumers


def attention_from_scores(scores: SharedScores, v: Tensor) -> Tensor:
    """A consumer: the owner's probabilities times its own values."""
    # An invisible key has P = 0 and must not count even where its value is NaN or infinite.
    unseen = ~(scores.probs != 0).any(dim=(1, 2))
    v = v.masked_fill(unseen[:, None, :, None], 0.0)
    return scores.probs @ repeat_kv(v, scores.probs.shape[1])


def share_kv(k: Tensor, v: Tensor) -> SharedKV:
    """Keys and values for any number of layers."""
    return SharedKV(k, v)


def attention_shared_kv(
    q: Tensor,
    shared: SharedKV,
    *,
    causal: bool = False,
    scale: float | None = None,
    lengths: Tensor | None = None,
    first_key: Tensor | None = None,
) -> Tensor:
    """Attention of one more layer's queries to shared keys and values."""
    return attention(q, shared.k, shared.v, causal=causal, scale=scale, lengths=lengths, first_key=first_key)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    first_key: Tensor | None = None,
    return_probs: bool = False,
) -> Tensor | tuple[Tensor, SharedScores]:
    """One new token a row against a padded cache."""
    probs, _ = probabilities(q, k, scale=scale, lengths=lengths, first_key=first_key)
    shared = SharedScores(probs)
    out = attention_from_scores(shared, v)
    return (out, shared) if return_probs else out


def decode_from_probs(probs: SharedScores, v: Tensor, lengths: Tensor) -> Tensor:
    """The next layer of a QK-sharing group while decoding."""
    return attention_from_scores(probs, v)
