r"""Kronecker-factored curvature of grouped tokens: the Fisher matrix of an expert's weights, and the variance of what it
predicts.

Tokens stand sorted by expert: ``offsets`` is int32 [E + 1], ascending, and expert e has the rows
``x[offsets[e]:offsets[e + 1]]``; rows outside of them belong to nobody. Experts may have any number of tokens, none included.

A *factor* is a symmetric positive matrix in its eigenvectors, ``(vectors [E, D, k], values [E, k], rest [E])``:

    F = U diag(values) Uᵀ + rest · (I − U Uᵀ),        U orthonormal,  k ≤ D

``rest`` is the mean of the eigenvalues that the k vectors leave out, so that the trace is kept; with k = D it is irrelevant.
The posterior precision of an expert's matrix W [O, I] is P = I / s² + A ⊗ B on the column-major vec(W), A over inputs and B
over outputs: its eigenvalues are 1 / s² + αᵢ βⱼ with α, β those of A and B, each rest counted as often as it occurs. So no
k² × k² matrix is ever factorised: determinants, solves and samples are closed forms in the two eigenbases.

Nothing here is differentiable but :func:`kron_log_det`, which is made of torch's own ops.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effcore.ops import _kronecker_autograd as _autograd
from effcore.ops import _kronecker_lowrank as _lowrank
from effcore.ops import _kronecker_variance as _variance

__all__ = ["Factor", "grouped_gram", "grouped_lowrank_update", "kron_log_det", "kron_variance"]


class Factor(NamedTuple):
    """A symmetric positive matrix for each expert, in its eigenvectors (see the module)."""

    vectors: Tensor  # [E, D, k]
    values: Tensor  # [E, k]
    rest: Tensor  # [E]


def grouped_gram(
    x: Tensor, offsets: Tensor, *, alpha: float = 1.0, beta: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """``alpha · XₑᵀXₑ + beta · out[e]`` for each expert: [E, D, D], symmetric, in float32 (float64 for float64 tokens).

    Half the work of a matrix product: only blocks on and above the diagonal are computed.

    Args:
        x: [T, D] in float32, bfloat16 or float16 (float64 on the CPU), contiguous in its last dimension.
        offsets: int32 [E + 1].
        out: contiguous [E, D, D] to write into, and returned. Of it, ``beta`` scales the upper triangle; with ``beta`` 0 it is
            not read. The one argument of this package that an op writes into: a running sum needs no second matrix.

    Raises:
        ValueError: naming the argument, what was expected and what came. On CUDA the values of ``offsets`` are not looked at:
            a group that leaves x or has no length is cut to what lies inside.
    """
    if out is None:
        if beta != 0:
            raise ValueError(f"effcore.grouped_gram: beta is {beta} but there is no out for it to scale")
        return _autograd.grouped_gram(x, offsets, alpha)
    _autograd.grouped_gram_(out, x, offsets, alpha, beta)
    return out


def grouped_lowrank_update(basis: Tensor, discarded: Tensor, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The best basis of rank k of ``basis · basisᵀ + XₑᵀXₑ``, and what it leaves out.

    Args:
        basis: [E, D, k] in float32 or float64, k ≤ D; zeros to begin with.
        discarded: [E], the trace that earlier bases left out.
        x, offsets: as in :func:`grouped_gram`.

    Returns:
        ``(basis, discarded)``, fresh. The columns are orthogonal, their squared lengths the greatest eigenvalues in descending
        order; ``discarded`` has grown by the trace that the new basis leaves out, so that tr(basis · basisᵀ) + discarded is the
        trace of everything that was seen.

    Exact (dense eigenvectors of the smaller side) where tokens + k or D is at most 512. Beyond that the eigenvectors are
    those of a block Krylov space of dimension 4 k + 24, which need not be the best ones to the last digit (the tests ask for
    99.9 % of the best trace on a slowly falling spectrum); the balance of the trace is exact. On the CPU the offsets
    are read; on a GPU nothing waits but for torch's own eigensolver.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    return _lowrank.grouped_lowrank_update(basis, discarded, x, offsets)


def kron_variance(
    a: Tensor,
    g: Tensor,
    offsets: Tensor,
    example: Tensor,
    examples: int,
    input_factor: Factor,
    output_factor: Factor,
    prior_variance: Tensor,
) -> Tensor:
    """The covariance of each example's logits under the posterior (arXiv 2511.08968), for a list of prior variances.

        Σₑ vec(Gₑ)ᵀ (I / s² + A ⊗ B)⁻¹ vec(Gₑ),        Gₑ[c] = ∂ logits[c] / ∂ Wₑ = Σ_t g[t, c] a[t]ᵀ

    summed over the example's tokens t in expert e.

    Args:
        a: [T, I], the tokens' inputs, sorted by expert.
        g: [T, C, O], the gradient of each logit at the tokens' outputs.
        offsets: int32 [E + 1].
        example: int64 [T], the example of the batch that a token belongs to, from 0 to ``examples`` - 1.
        input_factor: A, already divided by the number of tokens where that is wanted: [E, I, ka], [E, ka], [E].
        output_factor: B: [E, O, kb], [E, kb], [E].
        prior_variance: [S], s² > 0.

    Returns:
        [S, examples, C, C].

    The offsets are read on the host, and the work goes expert by expert.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    return _variance.kron_variance(
        a, g, offsets, example, examples, *input_factor, *output_factor, prior_variance.to(a.dtype)
    )


def kron_log_det(input_factor: Factor, output_factor: Factor, prior_variance: Tensor) -> Tensor:
    """log det(I + s² A ⊗ B) for each expert: [E]. Differentiable in ``prior_variance``, a number or [E] for one an expert.

    Eigenvalues with their multiplicities: ka·kb products of values, (O − kb) times each α with B's rest, (I − ka) times each β
    with A's rest, and the (I − ka)(O − kb) products of both rests.
    """
    (u, alpha, alpha_rest), (v, beta, beta_rest) = input_factor, output_factor
    inputs_left, outputs_left = u.shape[1] - u.shape[2], v.shape[1] - v.shape[2]
    s = torch.as_tensor(prior_variance, dtype=alpha.dtype, device=alpha.device).expand(len(alpha))
    inside = torch.log1p(s[:, None, None] * alpha[:, :, None] * beta[:, None, :]).sum((1, 2))
    left = torch.log1p(s[:, None] * alpha * beta_rest[:, None]).sum(1) * outputs_left
    right = torch.log1p(s[:, None] * beta * alpha_rest[:, None]).sum(1) * inputs_left
    both = torch.log1p(s * alpha_rest * beta_rest) * (inputs_left * outputs_left)
    return inside + left + right + both
