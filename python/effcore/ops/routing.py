r"""Moving tokens: which of them stay, and their way to shorter sequences and back.

``x`` is [B, N, C] in float32, bfloat16 or float16 (float64 on the CPU as well), with any strides as long as the last dimension
is contiguous. A list of tokens is int32 [B, K], any strides (so ``index.expand(B, -1)`` costs nothing). A *partition* is two
lists that name each token of a row once, as :func:`partition_tokens` makes them; :func:`separate_tokens` and
:func:`merge_tokens` are inverse to each other on one, and each is the other's gradient.

Results are fresh and contiguous, and the same bits in every run. Nothing waits for the device. Indices are checked on the CPU;
on CUDA under ``EFFCORE_DEBUG=1``: without it a bad index reads and writes no memory of others, but its rows are undefined.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from effcore.ops import _routing_autograd as _autograd

__all__ = [
    "circulate",
    "class_scores",
    "gather_layer_norm",
    "gather_rms_norm",
    "gather_tokens",
    "mean_scores",
    "merge_tokens",
    "partition_tokens",
    "permute_tokens",
    "score_partition",
    "separate_tokens",
    "split_tokens",
]


def partition_tokens(scores: Tensor, keep: int, *, protect: int = 0) -> tuple[Tensor, Tensor]:
    """Each row's ``keep`` tokens with the greatest scores, and the others.

    Args:
        scores: [B, N]. Ties go to the lower index; NaN comes last, after -inf.
        keep: from 0 to N, the same for each row.
        protect: the first so many tokens (class token, registers) always stay and count towards ``keep``.

    Returns:
        ``(kept, rest)``: int32 [B, keep] and [B, N - keep], both ascending. They carry no gradient.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    return _autograd.partition_tokens(scores, keep, protect)


def class_scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """How much one query attends to each token: the mean over heads of softmax(scale · q kᵀ). Not differentiable.

    Args:
        q: [B, H, 1, D], the class token's query.
        k: [B, Hkv, N, D]; H is a multiple of Hkv, and query head h reads kv head h // (H // Hkv).
        scale: default D ** -0.5.

    Returns:
        [B, N] float32 (float64 for float64 inputs).

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    return _autograd.class_scores(q, k, scale)


def score_partition(
    q: Tensor, k: Tensor, keep: int, *, protect: int = 0, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`partition_tokens` of :func:`class_scores`, in one launch, or two where few rows are shared out among many blocks.

    Args:
        q: [B, H, 1, D], the class token's query; k: [B, Hkv, N, D].
        keep, protect: as in :func:`partition_tokens`.

    Returns:
        kept int32 [B, keep] and rest int32 [B, N - keep], both ascending.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    return _autograd.score_partition(q, k, keep, protect, scale)


def mean_scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """How much all queries attend to each token: the mean over heads and queries of softmax(scale · q kᵀ), [B, N] float32.

    For models without a class token. The matrix of scores is never in memory: Pᵀ 1 is the gradient of attention with respect
    to values of width 1. ``q`` and ``k`` as in :func:`effcore.ops.attention.attention`. Not differentiable.
    """
    import effcore.ops.attention  # noqa: F401  (registers its ops)

    native = torch.ops.effcore
    with torch.no_grad():
        values = k.new_ones((*k.shape[:3], 1))
        ones = q.new_ones((*q.shape[:3], 1))
        out, lse = native.attention(q, k, values, None, None, False, scale)
        probs = q.new_empty(0)
        sums, _ = native.attention_from_scores_bwd(ones, out, q, k, values, lse, probs, None, None, False, scale)
        sums = sums[..., 0].to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        return sums.sum(1) / max(q.shape[1] * q.shape[2], 1)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """``out[b, i] = x[b, index[b, i]]``: [B, K, C]. Differentiable in ``x``; a token that is named twice gets the sum.

    Args:
        x: [B, N, C].
        index: int32 [B, K], in any order.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _debug_list("gather_tokens", index, x.shape[1])
    return _autograd.gather_tokens(x, index)


def separate_tokens(x: Tensor, index_a: Tensor, index_b: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a partition: ``(x[:, index_a], x[:, index_b])``, [B, Ka, C] and [B, Kb, C] with Ka + Kb = N.

    Differentiable in ``x``; the gradient is a merge, which writes each row once.

    Args:
        x: [B, N, C].
        index_a, index_b: a partition, int32 [B, Ka] and [B, Kb].

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _debug_lists("separate_tokens", index_a, index_b)
    return _autograd.separate_tokens(x, index_a, index_b)


def merge_tokens(
    a: Tensor,
    index_a: Tensor,
    b: Tensor,
    index_b: Tensor,
    *,
    residual: Tensor | None = None,
    residual_a: Tensor | None = None,
) -> Tensor:
    """The inverse of :func:`separate_tokens`: [B, Ka + Kb, C] in the original order. Differentiable in all of its rows.

    Args:
        a, b: [B, Ka, C] and [B, Kb, C].
        index_a, index_b: a partition of the Ka + Kb tokens, int32 [B, Ka] and [B, Kb].
        residual: [B, Ka + Kb, C] in the original order, added to the result (y = x + merge(...)).
        residual_a: [B, Ka, C], added to ``a`` (a block's residual connection). Sums are rounded once.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _debug_lists("merge_tokens", index_a, index_b)
    return _autograd.merge_tokens(a, index_a, b, index_b, residual, residual_a)


def permute_tokens(x: Tensor, order: Tensor, inverse: Tensor, sizes: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """``x[order]``, the rows of [N, C] in another order, cut into parts of ``sizes`` rows; the gradient goes by ``inverse``.

    Under torch.compile this is an index that Inductor moves into what reads the rows: in front of a norm or a sum they are
    never written in their new order. Otherwise it is one copy, and the parts are views of it.

    Args:
        x: [N, C].
        order, inverse: int32 [N], permutations with ``order[inverse[i]] = i``.
        sizes: sum up to N; None: one part.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    function = "effcore.permute_tokens"
    if x.dim() != 2 or order.shape != x.shape[:1] or inverse.shape != order.shape:
        raise ValueError(
            f"{function}: x must be [N, C] and order and inverse [N], "
            f"got {tuple(x.shape)}, {tuple(order.shape)} and {tuple(inverse.shape)}"
        )
    for name, index in (("order", order), ("inverse", inverse)):
        if index.dtype != torch.int32:
            raise ValueError(f"{function}: {name} must be int32, got {index.dtype}")
    parts = [x.shape[0]] if sizes is None else list(sizes)
    if sum(parts) != x.shape[0] or any(n < 0 for n in parts):
        raise ValueError(f"{function}: sizes must sum up to {x.shape[0]}, got {parts}")
    return _autograd.permute_tokens(x, order, inverse, parts)


def gather_layer_norm(
    x: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """``(tokens, normed)``: :func:`gather_tokens`, and the layer norm of what was gathered, reading each row once.

    A block on some of the tokens begins with both: the residual stream and its norm. Differentiable in x, weight and bias.

    Args:
        weight, bias: [C] in x's dtype or in float32.
    """
    _debug_list("gather_layer_norm", index, x.shape[1])
    return _autograd.gather_norm(x, index, weight, bias, eps, False)[:2]


def gather_rms_norm(x: Tensor, index: Tensor, weight: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """:func:`gather_layer_norm` with the root mean square, x · rsqrt(mean(x²) + eps) · weight: of x [B, N, C] and index [B, K]
    two tensors [B, K, C]."""
    _debug_list("gather_rms_norm", index, x.shape[1])
    return _autograd.gather_norm(x, index, weight, None, eps, True)[:2]


def split_tokens(length: int, *, attention_cost: tuple[float, float], ssm_cost: float) -> int:
    """How many of ``length`` tokens attention takes so that it ends together with the SSM that takes the rest (FlowHN).

        a·n + b·n² = c·(length - n)

    Args:
        attention_cost: ``(a, b)``, the cost of attention on n tokens, in any unit (FLOPs, microseconds).
        ssm_cost: c, the cost of a token in the SSM, in the same unit.

    Returns:
        n, rounded to where the slower branch is faster (ties to the smaller n).
    """
    a, b = attention_cost
    c = ssm_cost
    function = "effcore.split_tokens"
    if length < 0:
        raise ValueError(f"{function}: length must not be negative, got {length}")
    for name, value in (("attention_cost[0]", a), ("attention_cost[1]", b), ("ssm_cost", c)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{function}: {name} must be finite and not negative, got {value}")
    if a + b == 0 or c == 0:
        raise ValueError(f"{function}: both branches must cost something, got {attention_cost} and {ssm_cost}")
    linear = a + c
    root = 2 * c * length / (linear + math.sqrt(linear * linear + 4 * b * c * length))
    low = min(int(root), length)
    return min((low, min(low + 1, length)), key=lambda n: max(a * n + b * n * n, c * (length - n)))


def circulate(length: int, n: int, block: int, *, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Which tokens attention takes in the block of this number, and which the SSM: int32 [n] and [length - n], ascending.

        attention takes {(length - (block + 1)·n + j) mod length, 0 ≤ j < n}

    so that the part moves by n tokens from block to block, and each token meets attention in turn (FlowHN).
    """
    function = "effcore.circulate"
    if length < 0:
        raise ValueError(f"{function}: length must not be negative, got {length}")
    if not 0 <= n <= length:
        raise ValueError(f"{function}: n must be from 0 to length ({length}), got {n}")
    if block < 0:
        raise ValueError(f"{function}: block must not be negative, got {block}")
    start = (length - (block + 1) * n) % length if length else 0
    end = start + n

    def ranges(*bounds: tuple[int, int]) -> Tensor:
        return torch.cat([torch.arange(a, b, dtype=torch.int32, device=device) for a, b in bounds])

    if end <= length:
        return ranges((start, end)), ranges((0, start), (end, length))
    return ranges((0, end - length), (start, length)), ranges((end - length, start))


# ---------------------------------------------------------------- EFFCORE_DEBUG=1: indices on the GPU, at the price of a wait


def _debugging(index: Tensor) -> bool:
    return index.is_cuda and os.environ.get("EFFCORE_DEBUG") == "1" and not torch.compiler.is_compiling()


def _debug_list(function: str, index: Tensor, tokens: int) -> None:
    if _debugging(index) and index.numel() and not bool(((index >= 0) & (index < tokens)).all()):
        raise ValueError(
            f"effcore.{function}: index must be from 0 to {tokens - 1}, "
            f"got values from {int(index.min())} to {int(index.max())}"
        )


def _debug_lists(function: str, index_a: Tensor, index_b: Tensor) -> None:
    if not _debugging(index_a):
        return
    both = torch.cat([index_a, index_b], 1).sort(1).values
    if not bool((both == torch.arange(both.shape[1], device=both.device)).all()):
        raise ValueError(f"effcore.{function}: index_a and index_b do not name each of the {both.shape[1]} tokens once")
