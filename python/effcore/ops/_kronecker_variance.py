"""The covariance of logits under a Kronecker posterior: kernels in torch.

A token's input a and output gradient g split into what lies in the factors' bases (p, q) and what is orthogonal to them (a⊥,
g⊥); the blocks of the posterior covariance are diagonal in that split, so that

    Cov[c, d] = Σᵢⱼ w(αᵢ, βⱼ) H[c]ᵢⱼ H[d]ᵢⱼ + Σᵢ w(αᵢ, ρ_b) X[c]ᵢ·X[d]ᵢ + Σⱼ w(ρ_a, βⱼ) Y[c]ⱼ·Y[d]ⱼ + w(ρ_a, ρ_b) ⟨Z[c], Z[d]⟩

with w(α, β) = 1 / (1 / s² + α β), H = Σ_t q pᵀ, X = Σ_t g⊥ pᵀ, Y = Σ_t q a⊥ᵀ, Z = Σ_t g⊥ a⊥ᵀ. Z is never formed: its products
are sums over pairs of tokens, (a⊥·a⊥′)(g⊥·g⊥′).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


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
    classes = g.shape[1]
    result = a.new_zeros((len(prior_variance), examples, classes, classes))
    precision = 1 / prior_variance.to(a.dtype)
    for e, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        if begin == end:
            continue
        factors = [t[e].to(a.dtype) for t in (vectors_a, values_a, rest_a, vectors_b, values_b, rest_b)]
        _add_expert(result, a[begin:end], g[begin:end], example[begin:end], factors, precision)
    return result


def _add_expert(
    result: Tensor, a: Tensor, g: Tensor, example: Tensor, factors: list[Tensor], precision: Tensor
) -> None:
    u, alpha, alpha_rest, v, beta, beta_rest = factors
    present, number = example.unique(return_inverse=True)  # examples with tokens in this expert

    def weight(left: Tensor, right: Tensor) -> Tensor:
        """1 / (1 / s² + left · right), [S, ...]"""
        product = left * right
        return 1 / (precision.view(-1, *[1] * product.dim()) + product)

    def total(left: Tensor, right: Tensor) -> Tensor:
        """Σ over an example's tokens of left[t, c, j] right[t, i]: [B, C, j, i]"""
        rows = torch.einsum("tcj,ti->tcji", left, right)
        return rows.new_zeros((len(present), *rows.shape[1:])).index_add_(0, number, rows)

    p, q = a @ u, g @ v
    inside = total(q, p)
    covariance = torch.einsum("bcji,sji,bdji->sbcd", inside, weight(alpha[None, :], beta[:, None]), inside)
    inputs_left, outputs_left = u.shape[0] > u.shape[1], v.shape[0] > v.shape[1]
    if inputs_left:
        a = a - p @ u.mT
        y = total(q, a)
        covariance += torch.einsum("bcji,sj,bdji->sbcd", y, weight(beta, alpha_rest), y)
    if outputs_left:
        g = g - q @ v.mT
        x = total(g, p)
        covariance += torch.einsum("bcoi,si,bdoi->sbcd", x, weight(alpha, beta_rest), x)
    if inputs_left and outputs_left:
        outside = weight(alpha_rest, beta_rest)
        covariance += outside[:, None, None, None] * _pair_sums(a, g, number, len(present))
    result.index_add_(1, present, covariance)


def _pair_sums(a: Tensor, g: Tensor, number: Tensor, examples: int) -> Tensor:
    """Σ over pairs t, u of an example's tokens of (a_t · a_u) g_t g_uᵀ: [B, C, C].

    Examples with about as many tokens are padded to one length and multiplied together; at most half of a row is padding.
    """
    order, count = number.argsort(stable=True), torch.bincount(number, minlength=examples)
    first, width = count.cumsum(0) - count, count.double().log2().ceil()
    result = g.new_empty((examples, g.shape[1], g.shape[1]))
    for some in [(width == w).nonzero()[:, 0] for w in width.unique()]:
        place = torch.arange(int(count[some].max()), device=a.device)
        token = order[(first[some, None] + place).clamp_max(len(order) - 1)]
        left, right = a[token] * (place < count[some, None])[..., None], g[token]
        mixed = (left @ left.mT @ right.flatten(2)).view_as(right)
        result[some] = torch.einsum("btco,btdo->bcd", mixed, right)
    return result


@kron_variance.register_fake
def _(a, g, offsets, example, examples, va, la, ra, vb, lb, rb, prior_variance):
    return a.new_empty((prior_variance.shape[0], examples, g.shape[1], g.shape[1]))


# The projections onto the bases; what follows depends on how tokens fall on examples, and is smaller.
@register_flop_formula([torch.ops.effcore.kron_variance])
def _(a_shape, g_shape, _offsets, _example, _examples, va, _la, _ra, vb, *_args, out_shape=None, **_kwargs) -> int:
    (tokens, inputs), (_, classes, outputs) = a_shape, g_shape
    return 2 * tokens * (inputs * va[2] + classes * outputs * vb[2])
