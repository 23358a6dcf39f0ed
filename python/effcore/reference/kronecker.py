"""Kronecker factors of grouped tokens, as formulas in plain torch."""

import itertools

import torch
from torch import Tensor


def _groups(x: Tensor, offsets: Tensor) -> list[Tensor]:
    ends = offsets.tolist()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [x[a:b].to(dtype) for a, b in itertools.pairwise(ends)]


def grouped_gram(
    x: Tensor, offsets: Tensor, *, alpha: float = 1.0, beta: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """alpha · XₑᵀXₑ + beta · out[e]"""
    groups = _groups(x, offsets)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    grams = torch.stack([g.mT @ g for g in groups]) if groups else x.new_empty((0, x.shape[1], x.shape[1]), dtype=dtype)
    grams = alpha * grams
    return grams if out is None or beta == 0 else grams + beta * out


def grouped_lowrank_update(basis: Tensor, discarded: Tensor, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The best rank-k basis of basis · basisᵀ + XₑᵀXₑ through dense eigenvectors, and the trace that it leaves out."""
    rank = basis.shape[-1]
    new, left = [], []
    for old, lost, group in zip(basis, discarded, _groups(x, offsets), strict=True):
        total = old @ old.mT + (group.mT @ group).to(old.dtype)
        values, vectors = torch.linalg.eigh(total)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        new.append(vectors[:, :rank] * values[:rank].sqrt())
        left.append(lost + values[rank:].sum())
    return (torch.stack(new), torch.stack(left)) if new else (basis.clone(), discarded.clone())


def dense_factor(vectors: Tensor, values: Tensor, rest: Tensor) -> Tensor:
    """U diag(values) Uᵀ + rest (I - U Uᵀ), [E, D, D]."""
    identity = torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
    inside = vectors @ vectors.mT
    return (vectors * values[:, None]) @ vectors.mT + rest[:, None, None] * (identity - inside)


def kron_variance(
    a: Tensor,
    g: Tensor,
    expert: Tensor,
    example: Tensor,
    examples: int,
    input_factor: tuple[Tensor, Tensor, Tensor],
    output_factor: tuple[Tensor, Tensor, Tensor],
    prior_variance: Tensor,
) -> Tensor:
    """Through the dense posterior covariance of each expert, (I / s² + A ⊗ B)⁻¹ on the column-major vec of W."""
    factors_a, factors_b = dense_factor(*input_factor), dense_factor(*output_factor)
    classes, outputs, inputs = g.shape[1], g.shape[2], a.shape[1]
    result = a.new_zeros((len(prior_variance), examples, classes, classes))
    for e in range(len(factors_a)):
        curvature = torch.kron(factors_a[e], factors_b[e])
        for b in range(examples):
            tokens = (expert == e) & (example == b)
            # [C, O, I]: the gradient of each logit by the expert's matrix
            gradient = torch.einsum("tco,ti->coi", g[tokens], a[tokens])
            vec = gradient.mT.reshape(classes, inputs * outputs)  # column-major
            for s, variance in enumerate(prior_variance):
                precision = curvature + torch.eye(inputs * outputs, dtype=a.dtype) / variance
                result[s, b] += vec @ torch.linalg.solve(precision, vec.mT)
    return result
