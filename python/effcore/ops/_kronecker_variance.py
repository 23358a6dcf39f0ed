"""The covariance of logits under a Kronecker posterior: kernels in torch.

A token's input a and output gradient g split into what lies in the factors' bases (p, q) and what is orthogonal to them (a⊥,
g⊥); the blocks of the posterior covariance are diagonal in that split, so that

    Cov[c, d] = Σᵢⱼ w(αᵢ, βⱼ) H[c]ᵢⱼ H[d]ᵢⱼ + Σᵢ w(αᵢ, ρ_b) X[c]ᵢ·X[d]ᵢ + Σⱼ w(ρ_a, βⱼ) Y[c]ⱼ·Y[d]ⱼ + w(ρ_a, ρ_b) ⟨Z[c], Z[d]⟩

with w(α, β) = 1 / (1 / s² + α β), H = Σ_t q pᵀ, X = Σ_t g⊥ pᵀ, Y = Σ_t q a⊥ᵀ, Z = Σ_t g⊥ a⊥ᵀ. Z is never formed: its products
are sums over pairs of tokens, (a⊥·a⊥′)(g⊥·g⊥′).
"""

from __future__ import annotations

from collections.abc import Iterator

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

    def weight(left: Tensor, right: Tensor) -> Tensor:
        """1 / (1 / s² + left · right), [S, ...]"""
        product = left * right
        return 1 / (precision.view(-1, *[1] * product.dim()) + product)

    inputs_left, outputs_left = u.shape[0] > u.shape[1], v.shape[0] > v.shape[1]
    p, q = a @ u, g @ v
    if inputs_left:
        a = a - p @ u.mT
    if outputs_left:
        g = g - q @ v.mT
    for some, token, real in _by_example(example, result.shape[1]):
        inside_a, inside_g, real = p[token], q[token], real[..., None]

        def total(left: Tensor, right: Tensor) -> Tensor:
            """Σ over an example's tokens of left[b, t, c, j] right[b, t, i]: [B, C, j, i]"""
            return (left.flatten(2).mT @ right).unflatten(1, left.shape[2:])

        inside = total(inside_g, inside_a * real)
        covariance = torch.einsum("bcji,sji,bdji->sbcd", inside, weight(alpha[None, :], beta[:, None]), inside)
        if inputs_left:
            outside_a = a[token] * real
            y = total(inside_g, outside_a)
            covariance += torch.einsum("bcji,sj,bdji->sbcd", y, weight(beta, alpha_rest), y)
        if outputs_left:
            outside_g = g[token]
            x = total(outside_g, inside_a * real)
            covariance += torch.einsum("bcoi,si,bdoi->sbcd", x, weight(alpha, beta_rest), x)
        if inputs_left and outputs_left:
            pairs = (outside_a @ outside_a.mT @ outside_g.flatten(2)).view_as(outside_g)
            both = torch.einsum("btco,btdo->bcd", pairs, outside_g)
            covariance += weight(alpha_rest, beta_rest)[:, None, None, None] * both
        result[:, some] += covariance


def _by_example(example: Tensor, examples: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens by example: ``(some [b], token [b, t], real [b, t])``, for examples with about as many tokens at a time: at most
    half of a row is padding."""
    order, count = example.argsort(stable=True), torch.bincount(example, minlength=examples)
    first, width = count.cumsum(0) - count, count.double().log2().ceil()
    for w in width[count > 0].unique():
        some = (width == w).nonzero()[:, 0]
        place = torch.arange(int(count[some].max()), device=example.device)
        yield some, order[(first[some, None] + place).clamp_max(len(order) - 1)], place < count[some, None]


@kron_variance.register_fake
def _(a, g, offsets, example, examples, va, la, ra, vb, lb, rb, prior_variance):
    return a.new_empty((prior_variance.shape[0], examples, g.shape[1], g.shape[1]))


# The projections onto the bases; what follows depends on how tokens fall on examples, and is smaller.
@register_flop_formula([torch.ops.effcore.kron_variance])
def _(a_shape, g_shape, _offsets, _example, _examples, va, _la, _ra, vb, *_args, out_shape=None, **_kwargs) -> int:
    (tokens, inputs), (_, classes, outputs) = a_shape, g_shape
    return 2 * tokens * (inputs * va[2] + classes * outputs * vb[2])
