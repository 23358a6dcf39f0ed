r"""Factors of a weight: truncated SVD, Tucker-2 with HOOI, both plain or weighted by the inputs' second moments.

    linear, 1×1     W ≈ up · down,              up = U_r √Σ_r,  down = √Σ_r V_rᵀ            (arXiv 2407.20266, section 2)
    k×k             W ≈ core ×₁ last ×₂ first   on the channel modes, refined by higher-order orthogonal iteration

With moments M = E[x xᵀ] = L Lᵀ of the inputs, what counts is the error of the outputs, E‖(W − Ŵ) x‖² = ‖(W − Ŵ) L‖²: factor
W L and multiply by L⁻¹ on the right.

Ranks for a compression α (β = r2 / r1):
    linear  R  = C S / (α (C + S))
    k×k     r1 = (−(C + βS)/(βk²) + √((C + βS)²/(β²k⁴) + 4CS/(βα))) / 2,   r2 = β r1
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# eigh on a GPU takes as long for any small matrix; up to about this size LAPACK is done before it (an H200 and two host cores).
HOST_EIGH = 512


def svd_rank(out_features: int, in_features: int, ratio: float) -> int:
    """The rank at which two factors have 1 / ratio of the weight's parameters, rounded down."""
    return int(out_features * in_features / (ratio * (out_features + in_features)))


def tucker_ranks(in_channels: int, out_channels: int, taps: int, ratio: float) -> tuple[int, int]:
    """(r1, r2) at which the three convolutions have 1 / ratio of the kernel's parameters, rounded down.

    ``taps`` is k². β = S / C, so that both channel modes shrink alike. At ratio 2 and 3×3: 38, 77, 154, 309 for 64, 128, 256,
    512 channels.
    """
    c, s, beta = in_channels, out_channels, out_channels / in_channels
    thin = (c + beta * s) / (beta * taps)
    r1 = (-thin + math.sqrt(thin * thin + 4 * c * s / (beta * ratio))) / 2
    return int(r1), int(beta * r1)


def root(moments: Tensor | None, size: int) -> Tensor | None:
    """L with L Lᵀ = M, from second moments [size, size].

    A ridge keeps directions that no input had: the least of 1e-6, 1e-5, ... of the mean moment that makes M positive definite.
    """
    if moments is None:
        return None
    m = moments.double()
    mean = m.diagonal().mean().clamp_min(1e-30)
    for power in range(-6, 1):
        l, failed = torch.linalg.cholesky_ex(m + torch.eye(size, dtype=m.dtype, device=m.device) * (10.0**power * mean))
        if not failed:
            return l
    raise ValueError("effcore.decompose: the calibration inputs hold NaN or infinities")


def _undo(factor: Tensor, l: Tensor | None) -> Tensor:
    """factor · L⁻¹"""
    return factor if l is None else torch.linalg.solve_triangular(l, factor, upper=False, left=False)


def _leading(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, greatest first, and their eigenvectors as columns."""
    device = gram.device
    if gram.is_cuda and len(gram) <= HOST_EIGH:
        gram = gram.cpu()
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0).to(device), vectors.flip(1).to(device)


@dataclass
class MatrixFactors:
    """All truncations of one matrix [out, in].

    The singular vectors of the shorter side come from its Gram matrix (a tenth of the time of an SVD); the other factor is the
    projection on them, so that at full rank the product is the matrix itself, to rounding, whatever the small singular values.
    """

    a: Tensor  # W L
    values: Tensor  # squares of the singular values
    basis: Tensor  # orthonormal columns: of the outputs, or of the (weighted) inputs where those are fewer
    l: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, moments: Tensor | None = None) -> MatrixFactors:
        l = root(moments, weight.shape[1])
        a = weight.detach().double()
        a = a if l is None else a @ l
        return cls(a, *_leading(a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a), l)

    def error(self, rank: int) -> float:
        """‖(W − Ŵ) L‖ / ‖W L‖ at this rank."""
        return math.sqrt(float(self.values[rank:].sum() / self.values.sum().clamp_min(1e-300)))

    def rank_for(self, error: float) -> int:
        """The smallest rank with at most this error."""
        lost = self.values.flip(0).cumsum(0).flip(0) / self.values.sum().clamp_min(1e-300)  # without rank i and above
        return max(1, int((lost.sqrt() > error).sum()))

    def split(self, rank: int) -> tuple[Tensor, Tensor]:
        """(down [rank, in], up [out, rank]), singular values shared out evenly."""
        # Singular values near zero would put a huge factor beside a tiny one.
        scale = self.values[:rank].clamp_min(1e-12 * float(self.values[0].clamp_min(1e-300))).pow(0.25)
        basis = self.basis[:, :rank]
        if self.a.shape[0] <= self.a.shape[1]:
            return _undo(basis.T @ self.a / scale[:, None], self.l), basis * scale
        return _undo(basis.T * scale[:, None], self.l), self.a @ basis / scale


@dataclass
class KernelFactors:
    """Tucker-2 of one kernel [out, in, kh, kw] at any ranks."""

    w: Tensor  # already times L on the input channels
    l: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, moments: Tensor | None = None) -> KernelFactors:
        w, l = weight.detach().double(), root(moments, weight.shape[1])
        return cls(w if l is None else torch.einsum("oihw,ij->ojhw", w, l), l)

    def _gram(self, w: Tensor, mode: int) -> Tensor:
        flat = w.movedim(mode, 0).flatten(1)
        return flat @ flat.T

    def ranks_for(self, error: float) -> tuple[int, int]:
        """Ranks whose error is at most this: each mode may lose half of its square (the bound of the HOSVD)."""
        ranks = []
        for mode in (1, 0):
            energy = _leading(self._gram(self.w, mode))[0]
            lost = energy.flip(0).cumsum(0).flip(0) / energy.sum().clamp_min(1e-300)
            ranks.append(max(1, int((lost > error * error / 2).sum())))
        return ranks[0], ranks[1]

    def split(self, ranks: tuple[int, int], iterations: int = 8) -> tuple[Tensor, Tensor, Tensor]:
        """(first [r1, in], core [r2, r1, kh, kw], last [out, r2]).

        Truncated HOSVD, then HOOI: each mode's basis is the best for the other's, in turn, until the core's norm (which is
        what the factors keep) stands still.
        """
        r1, r2 = ranks
        v = _leading(self._gram(self.w, 1))[1][:, :r1]
        kept = -1.0
        for _ in range(iterations):
            u = _leading(self._gram(torch.einsum("oihw,iq->oqhw", self.w, v), 0))[1][:, :r2]
            half = torch.einsum("oihw,op->pihw", self.w, u)
            v = _leading(self._gram(half, 1))[1][:, :r1]
            core = torch.einsum("pihw,iq->pqhw", half, v)
            norm = float(core.norm())
            if norm - kept <= 1e-9 * max(norm, 1e-300):
                break
            kept = norm
        return _undo(v.T, self.l), core, u


def relative_error(weight: Tensor, approximation: Tensor, moments: Tensor | None = None) -> float:
    """‖(W − Ŵ) L‖ / ‖W L‖, measured on the factors as they are stored. Kernels count with their channel moments."""
    w, d = weight.detach().double(), (weight.detach().double() - approximation.detach().double())
    l = root(moments, weight.shape[1])
    if l is not None:
        w, d = (torch.einsum("oi...,ij->oj...", t, l) for t in (w, d))
    return float(d.norm() / w.norm().clamp_min(1e-300))


def reorder(energy: Tensor, branches: int, sweeps: int = 20) -> tuple[Tensor, Tensor]:
    """Orders of rows and columns that bring the energy of a matrix [r2, r1] into ``branches`` diagonal blocks.

    Rows and columns are dealt to the blocks in turn, each time the best balanced deal for the other's: those with most to lose
    choose first. The sum on the diagonal does not fall; it ends at a local optimum.
    """
    rows, columns = energy.shape
    order = torch.argsort(energy.sum(1), descending=True)
    row_block = torch.empty(rows, dtype=torch.long)
    row_block[order.cpu()] = torch.arange(rows) % branches
    best, result = -1.0, None
    e = energy.detach().double().cpu()
    for _ in range(sweeps):
        column_block = _deal(e.T @ torch.nn.functional.one_hot(row_block, branches).double(), columns // branches)
        row_block = _deal(e @ torch.nn.functional.one_hot(column_block, branches).double(), rows // branches)
        kept = float(e[row_block[:, None] == column_block[None, :]].sum())
        if kept <= best * (1 + 1e-12):
            break
        best, result = kept, (row_block.argsort(stable=True), column_block.argsort(stable=True))
    assert result is not None
    return result


def _deal(gain: Tensor, size: int) -> Tensor:
    """Each row of gain [n, blocks] to one block, ``size`` rows a block, by regret."""
    n, blocks = gain.shape
    top = gain.topk(min(2, blocks), 1).values
    regret = top[:, 0] - top[:, -1]
    room = [size] * blocks
    owner = torch.empty(n, dtype=torch.long)
    preference = gain.argsort(1, descending=True).tolist()
    for row in regret.argsort(descending=True).tolist():
        block = next(b for b in preference[row] if room[b])
        room[block] -= 1
        owner[row] = block
    return owner
