"""The covariance of logits under a Kronecker posterior: kernels in torch.

A token's input a and output gradient g split into what lies in the factors' bases (p, q) and what is orthogonal to them (a⊥,
g⊥); the blocks of the posterior covariance are diagonal in that split, so that

    Cov[c, d] = Σᵢⱼ w(αᵢ, βⱼ) H[c]ᵢⱼ H[d]ᵢⱼ + Σᵢ w(αᵢ, ρ_b) X[c]ᵢ·X[d]ᵢ + Σⱼ w(ρ_a, βⱼ) Y[c]ⱼ·Y[d]ⱼ + w(ρ_a, ρ_b) ⟨Z[c], Z[d]⟩

with w(α, β) = 1 / (1 / s² + α β), H = Σ_t q pᵀ, X = Σ_t g⊥ pᵀ, Y = Σ_t q a⊥ᵀ, Z = Σ_t g⊥ a⊥ᵀ. Z is never formed: its products
are sums over pairs of tokens, (a⊥·a⊥′)(g⊥·g⊥′).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

MOST = 1 << 27  # numbers that are made at a time


def _refuse(
    a: Tensor, g: Tensor, offsets: Tensor, example: Tensor, factors: list[tuple[str, Tensor, Tensor, Tensor]]
) -> None:
    function = "effcore.kron_variance"
    if a.dim() != 2:
        raise ValueError(f"{function}: a must have 2 dimensions [tokens, inputs] but has shape {list(a.shape)}")
    if g.dim() != 3 or len(g) != len(a):
        raise ValueError(f"{function}: g must have shape [{len(a)}, classes, outputs] but has {list(g.shape)}")
    if example.shape != (len(a),):
        raise ValueError(f"{function}: example must have shape [{len(a)}] but has {list(example.shape)}")
    experts = len(offsets) - 1
    for name, vectors, values, rest in factors:
        dim = (a if name == "input_factor" else g).shape[-1]
        if vectors.dim() != 3 or vectors.shape[:2] != (experts, dim) or vectors.shape[2] > dim:
            raise ValueError(
                f"{function}: {name} must have vectors [{experts}, {dim}, at most {dim}] but they are {list(vectors.shape)}"
            )
        if values.shape != (experts, vectors.shape[2]) or rest.shape != (experts,):
            raise ValueError(
                f"{function}: {name} must have values [{experts}, {vectors.shape[2]}] and rest [{experts}] "
                f"but has {list(values.shape)} and {list(rest.shape)}"
            )


@torch.library.custom_op("effcore::kron_variance", mutates_args=())
def kron_variance(
    a: Tensor,
    g: Tensor,
    offsets: Tensor,
    example: Tensor,
    examples: int,
    vectors_a: Tensor,
    values_a: Tensor,
    rest_a: Tensor,
    vectors_b: Tensor,
    values_b: Tensor,
    rest_b: Tensor,
    prior_variance: Tensor,
) -> Tensor:
    _refuse(
        a,
        g,
        offsets,
        example,
        [("input_factor", vectors_a, values_a, rest_a), ("output_factor", vectors_b, values_b, rest_b)],
    )
    experts, classes = len(vectors_a), g.shape[1]
    ends = offsets.tolist()
    a, g, example = a[ends[0] : ends[-1]], g[ends[0] : ends[-1]], example[ends[0] : ends[-1]]
    spans = [(e, begin - ends[0], end - ends[0]) for e, (begin, end) in enumerate(pairwise(ends)) if begin < end]
    p, a_left = _split(a, vectors_a, spans)
    q, g_left = _split(g, vectors_b, spans)
    factors = [t.to(p.dtype) for t in (values_a, rest_a, values_b, rest_b)]
    precision = 1 / prior_variance.to(p.dtype)
    # By example and expert, each sum in a place of its own: the order in which they are added up is always the same.
    result = p.new_zeros((len(prior_variance), examples * experts, classes, classes))
    expert = torch.repeat_interleave(offsets.diff().long(), output_size=len(p))
    for some, token, real in _groups(example * experts + expert, p, q, a_left, g_left, len(prior_variance)):
        left, right = (None if t is None else t[token] for t in (a_left, g_left))
        of_each = [t[some % experts] for t in factors]
        result[:, some] = _covariances(p[token], q[token], left, right, real[..., None], of_each, precision)
    return result.unflatten(1, (examples, experts)).sum(2)


def _split(x: Tensor, vectors: Tensor, spans: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor | None]:
    """Of each expert's rows, their coordinates in its basis, and what is orthogonal to it: None where the basis is all of the
    space."""
    inside = x.new_empty((*x.shape[:-1], vectors.shape[2]))
    outside = torch.empty_like(x) if vectors.shape[2] < vectors.shape[1] else None
    for e, begin, end in spans:
        basis = vectors[e].to(x.dtype)
        inside[begin:end] = x[begin:end] @ basis
        if outside is not None:
            outside[begin:end] = x[begin:end] - inside[begin:end] @ basis.mT
    return inside, outside


def _groups(
    key: Tensor, p: Tensor, q: Tensor, a: Tensor | None, g: Tensor | None, variances: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens with equal keys side by side: ``(keys [n], token [n, t], real [n, t])``, for keys with about as many tokens at a
    time, so that at most half of a row is padding, and so few that ``MOST`` numbers hold what is made of them."""
    keys, number, count = key.unique(return_inverse=True, return_counts=True)
    order, first = number.argsort(stable=True), count.cumsum(0) - count
    width = count.double().log2().ceil()
    classes, inside = q.shape[1], p.shape[-1] * q.shape[-1]
    widths = [0 if t is None else t.shape[-1] for t in (a, g)]
    for w in width.unique().tolist():
        alike = (width == w).nonzero()[:, 0]
        place = torch.arange(int(count[alike].max()), device=key.device)
        numbers = inside * (classes**2 + variances) + len(place) * (p.shape[-1] + classes * q.shape[-1] + len(place))
        numbers += widths[0] * (len(place) + classes * q.shape[-1]) + widths[1] * classes * (len(place) + p.shape[-1])
        for some in alike.split(max(1, MOST // numbers)):
            token = order[(first[some, None] + place).clamp_max(len(order) - 1)]
            yield keys[some], token, place < count[some, None]


def _covariances(
    p: Tensor, q: Tensor, a: Tensor | None, g: Tensor | None, real: Tensor, factors: list[Tensor], precision: Tensor
) -> Tensor:
    """[S, n, C, C] of n groups of tokens: p [n, t, i], q [n, t, c, j], the orthogonal parts a [n, t, I] and g [n, t, c, O]; and
    each group's factors."""
    alpha, alpha_rest, beta, beta_rest = factors
    p = p * real

    def weight(left: Tensor, right: Tensor) -> Tensor:
        """1 / (1 / s² + left · right), [S, ...]"""
        product = left * right
        return 1 / (precision.view(-1, *[1] * product.dim()) + product)

    def total(left: Tensor, right: Tensor) -> Tensor:
        """Σ over a group's tokens of left[n, t, c, j] right[n, t, i]: [n, c, j, i]"""
        return (left.flatten(2).mT @ right).unflatten(1, left.shape[2:])

    inside = total(q, p)
    pairs = inside[:, :, None] * inside[:, None]
    covariance = torch.einsum("ncdji,snji->sncd", pairs, weight(alpha[:, None, :], beta[:, :, None]))
    if a is not None:
        a = a * real
        y = total(q, a)
        covariance += torch.einsum(
            "ncdj,snj->sncd", torch.einsum("ncji,ndji->ncdj", y, y), weight(beta, alpha_rest[:, None])
        )
    if g is not None:
        x = total(g, p)
        covariance += torch.einsum(
            "ncdi,sni->sncd", torch.einsum("ncoi,ndoi->ncdi", x, x), weight(alpha, beta_rest[:, None])
        )
    if a is not None and g is not None:
        both = torch.einsum("ntco,ntdo->ncd", (a @ a.mT @ g.flatten(2)).view_as(g), g)
        covariance += weight(alpha_rest, beta_rest)[..., None, None] * both
    return covariance


@kron_variance.register_fake
def _(a, g, offsets, example, examples, va, la, ra, vb, lb, rb, prior_variance):
    return a.new_empty((prior_variance.shape[0], examples, g.shape[1], g.shape[1]))


# The projections onto the bases; what follows depends on how tokens fall on examples, and is smaller.
@register_flop_formula([torch.ops.effcore.kron_variance])
def _(a_shape, g_shape, _offsets, _example, _examples, va, _la, _ra, vb, *_args, out_shape=None, **_kwargs) -> int:
    (tokens, inputs), (_, classes, outputs) = a_shape, g_shape
    return 2 * tokens * (inputs * va[2] + classes * outputs * vb[2])
