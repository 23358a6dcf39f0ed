"""The rank-k basis of a growing Gram matrix: kernels in torch, where an eigensolver and large products are all there is to it.

The dense eigenproblem is taken on the smaller side of the stacked rows R = [basisᵀ; X]: R Rᵀ = U Λ Uᵀ gives the basis Rᵀ U,
whose columns have length √λ already. Where both sides are large, Rayleigh-Ritz in a block Krylov space of RᵀR (Musco and
Musco 2015, arXiv:1504.05477, algorithm 2).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effcore.ops import _kronecker_autograd as _autograd

DENSE = 512  # rows of an eigenproblem that is solved densely
_DENSE_BATCHED = 32  # the same where they are solved in one batch, on a GPU
_OVERSAMPLE, _DEPTH = 8, 3  # of the Krylov space
_EXTRA, _ITERATIONS = 12, 6  # of the subspace iteration
_WORKSPACE = 256 << 20  # bytes of Gram matrices that exist at a time on a GPU


def krylov_dimension(rank: int) -> int:
    return rank + _DEPTH * (rank + _OVERSAMPLE)


def _refuse(basis: Tensor, discarded: Tensor, x: Tensor, offsets: Tensor) -> None:
    function = "effcore.grouped_lowrank_update"
    if x.dim() != 2:
        raise ValueError(f"{function}: x must have 2 dimensions [tokens, features] but has shape {list(x.shape)}")
    if offsets.dim() != 1 or offsets.dtype != torch.int32 or not len(offsets):
        raise ValueError(
            f"{function}: offsets must be int32 [experts + 1] but is {offsets.dtype} {list(offsets.shape)}"
        )
    experts, dim = len(offsets) - 1, x.shape[1]
    if basis.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{function}: basis must be float32 or float64 but is {basis.dtype}")
    if basis.dim() != 3 or basis.shape[:2] != (experts, dim):
        raise ValueError(f"{function}: basis must have shape [{experts}, {dim}, rank] but has {list(basis.shape)}")
    if basis.shape[2] > dim:
        raise ValueError(f"{function}: basis has rank {basis.shape[2]}, above the dimension {dim}")
    if discarded.shape != (experts,) or discarded.dtype != basis.dtype:
        raise ValueError(
            f"{function}: discarded must be {basis.dtype} [{experts}] but is {discarded.dtype} {list(discarded.shape)}"
        )


def _top(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The greatest eigenvalues and their vectors, in descending order."""
    values, vectors = torch.linalg.eigh(matrix)
    return values[..., -rank:].flip(-1).clamp_min(0), vectors[..., -rank:].flip(-1)


def _krylov(multiply: Callable[[Tensor], Tensor], basis: Tensor) -> Tensor:
    """Approximates the best basis [..., D, k] of the matrix that ``multiply`` applies; ``basis`` [..., D, k] is a first
    guess."""
    rank = basis.shape[-1]
    generator = torch.Generator().manual_seed(0)  # the same numbers in every call: results are deterministic
    start = torch.randn(basis.shape[-2], rank + _OVERSAMPLE, generator=generator, dtype=basis.dtype).to(basis.device)
    block = start.expand(*basis.shape[:-2], *start.shape)
    blocks = [basis]
    for _ in range(_DEPTH):
        block = torch.linalg.qr(multiply(block)).Q
        blocks.append(block)
    space = torch.linalg.qr(torch.cat(blocks, -1)).Q
    image = multiply(space)
    values, vectors = _top(space.mT @ image, rank)
    return space @ (vectors * values.sqrt().unsqueeze(-2))


def _orthonormal(x: Tensor, passes: int) -> Tensor:
    """An orthonormal basis of the columns of [..., D, n], some of it shorter where columns depend on each other.

    Batched, as QR on a GPU is not: Cholesky's, in float64. A second pass removes what rounding left of the first.
    """
    q = x.double()
    identity = torch.eye(x.shape[-1], dtype=q.dtype, device=x.device)
    for _ in range(passes):
        gram = q.mT @ q
        shift = (1e-15 * gram.diagonal(dim1=-2, dim2=-1).sum(-1)).clamp_min(1e-300)
        root = torch.linalg.cholesky_ex(gram + shift[..., None, None] * identity).L
        # The small matrix's inverse, and a product: a batched triangular solve of D rows takes far longer.
        q = q @ torch.linalg.solve_triangular(root, identity.expand_as(root), upper=False).mT
    return q.to(x.dtype)


def _iterate(gram: Tensor, basis: Tensor) -> Tensor:
    """The best basis [E, D, k] of matrices [E, D, D] by subspace iteration from ``basis`` and random columns.

    For a GPU: its products are batched, and so are eigenproblems of up to 32 columns (cuSOLVER's; larger ones go one by one).
    In tests it captures what :func:`_krylov` does, with more products and a third of the columns.
    """
    dim, rank = basis.shape[-2:]
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(dim, min(rank + _EXTRA, dim), generator=generator, dtype=basis.dtype) / dim**0.5
    block = 0.1 * random.to(basis.device).repeat(len(basis), 1, 1)  # also beside the basis, whose columns may be zero
    block[..., :rank] += torch.nn.functional.normalize(basis, dim=-2, eps=1e-30)
    for i in range(_ITERATIONS):
        block = _orthonormal(gram @ block, passes=1 if i + 1 < _ITERATIONS else 2)
    values, vectors = _top(block.mT @ (gram @ block), basis.shape[-1])
    return block @ (vectors * values.sqrt().unsqueeze(-2))


def _update_one(basis: Tensor, x: Tensor) -> Tensor:
    """[D, k] of one expert with tokens."""
    rank, dim = basis.shape[1], basis.shape[0]
    rows = torch.cat([basis.mT, x.to(basis.dtype)])
    side = min(len(rows), dim)
    if side > max(DENSE, krylov_dimension(rank)):
        return _krylov(lambda q: rows.mT @ (rows @ q), basis)
    if len(rows) > dim:
        values, vectors = _top(rows.mT @ rows, rank)
        return vectors * values.sqrt()
    _, vectors = _top(rows @ rows.mT, rank)
    return rows.mT @ vectors


@torch.library.custom_op("effcore::grouped_lowrank_update", mutates_args=(), device_types="cpu")
def grouped_lowrank_update(basis: Tensor, discarded: Tensor, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    _refuse(basis, discarded, x, offsets)
    basis, discarded = basis.clone(memory_format=torch.contiguous_format), discarded.clone()
    if basis.shape[2] == 0:
        discarded += torch.stack([x[a:b].to(basis.dtype).square().sum() for a, b in _spans(offsets, len(x))]).to(basis)
        return basis, discarded
    for e, (begin, end) in enumerate(_spans(offsets, len(x))):
        if begin == end:
            continue
        group = x[begin:end]
        before = basis[e].square().sum() + group.to(basis.dtype).square().sum()
        basis[e] = _update_one(basis[e], group)
        discarded[e] += (before - basis[e].square().sum()).clamp_min(0)
    return basis, discarded


def _spans(offsets: Tensor, tokens: int) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if not begin <= end <= tokens:
            raise ValueError(
                f"effcore.grouped_lowrank_update: offsets[{e}] is {end} but must be from {begin} to the {tokens} tokens of x"
            )
    return list(itertools.pairwise(ends))


@grouped_lowrank_update.register_kernel("cuda")
def _(basis: Tensor, discarded: Tensor, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices of some experts at a time, so that memory does not grow with experts · D²."""
    _refuse(basis, discarded, x, offsets)
    experts, dim, rank = basis.shape
    some = max(1, _WORKSPACE // max(dim * dim * basis.element_size(), 1))
    bases, left = [basis[:0]], [discarded[:0]]
    for first in range(0, experts, some):
        part = basis[first : first + some]
        gram = _autograd.grouped_gram(x, offsets[first : first + len(part) + 1].contiguous(), 1.0).to(basis.dtype)
        gram.baddbmm_(part, part.mT)
        if rank == 0:
            new = part
        elif dim > max(_DENSE_BATCHED, rank + _EXTRA):
            new = _iterate(gram, part)
        else:
            values, vectors = _top(gram, rank)
            new = vectors * values.sqrt().unsqueeze(-2)
        trace = gram.diagonal(dim1=1, dim2=2).sum(1)
        bases.append(new)
        left.append(discarded[first : first + some] + (trace - new.square().sum((1, 2))).clamp_min(0))
    return torch.cat(bases), torch.cat(left)


@grouped_lowrank_update.register_fake
def _(basis, discarded, x, offsets):
    return torch.empty_like(basis, memory_format=torch.contiguous_format), torch.empty_like(discarded)


# The Krylov path, which is where the time goes: each of its products reads the tokens twice.
@register_flop_formula([torch.ops.effcore.grouped_lowrank_update])
def _(basis_shape, _discarded_shape, x_shape, *_args, out_shape=None, **_kwargs) -> int:
    experts, dim, rank = basis_shape
    columns = _DEPTH * (rank + _OVERSAMPLE) + krylov_dimension(rank)
    return 4 * (x_shape[0] + experts * rank) * dim * columns
