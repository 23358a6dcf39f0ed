"""Token movement, as formulas in plain torch. Differentiable by torch's own autograd, in whatever dtype the inputs have."""

import math

import torch
from torch import Tensor


def partition_tokens(scores: Tensor, keep: int, *, protect: int = 0) -> tuple[Tensor, Tensor]:
    """The ``keep`` tokens of each row with the greatest scores, and the others; both ascending."""
    kept, rest = [], []
    for row in scores.tolist():

        def rank(n: int, row: list[float] = row) -> tuple[bool, bool, float, int]:
            """Protected tokens first, then by score with NaN last, then by index."""
            return n >= protect, math.isnan(row[n]), 0.0 if math.isnan(row[n]) else -row[n], n

        order = sorted(range(len(row)), key=rank)
        kept.append(sorted(order[:keep]))
        rest.append(sorted(order[keep:]))
    batch, tokens = scores.shape

    def as_tensor(lists: list[list[int]], size: int) -> Tensor:
        return torch.tensor(lists, dtype=torch.int32, device=scores.device).view(batch, size)

    return as_tensor(kept, keep), as_tensor(rest, tokens - keep)


def class_scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """The mean over heads of softmax(scale · q kᵀ) of one query, in float32 or better."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (scale * q.to(dtype) @ k.to(dtype).mT).softmax(-1)[:, :, 0].mean(1)


def score_partition(
    q: Tensor, k: Tensor, keep: int, *, protect: int = 0, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    return partition_tokens(class_scores(q, k, scale), keep, protect=protect)


def _wide(index: Tensor, x: Tensor) -> Tensor:
    return index.long()[:, :, None].expand(-1, -1, x.shape[2])


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """out[b, i] = x[b, index[b, i]]"""
    return x.gather(1, _wide(index, x))


def separate_tokens(x: Tensor, index_a: Tensor, index_b: Tensor) -> tuple[Tensor, Tensor]:
    return gather_tokens(x, index_a), gather_tokens(x, index_b)


def merge_tokens(
    a: Tensor,
    index_a: Tensor,
    b: Tensor,
    index_b: Tensor,
    *,
    residual: Tensor | None = None,
    residual_a: Tensor | None = None,
) -> Tensor:
    """out[b, index_a[b, i]] = a[b, i] and out[b, index_b[b, i]] = b[b, i], plus the residuals."""
    if residual_a is not None:
        a = a + residual_a
    index = torch.cat([index_a, index_b], 1)
    out = torch.cat([a, b], 1)
    out = torch.zeros_like(out).scatter(1, _wide(index, out), out)
    return out if residual is None else out + residual


def gather_layer_norm(
    x: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    tokens = gather_tokens(x, index)
    centred = tokens - tokens.mean(-1, keepdim=True)
    xhat = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return tokens, xhat * weight.to(x.dtype) + (0 if bias is None else bias.to(x.dtype))


def gather_rms_norm(x: Tensor, index: Tensor, weight: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    tokens = gather_tokens(x, index)
    return tokens, tokens * (tokens.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(x.dtype)
