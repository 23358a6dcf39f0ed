"""The Fisher matrix of tapped layers, gathered batch by batch: what a Laplace fit holds while it streams over the data.

For expert e, with a the input and g the gradient of log p(y|x) at the output of each of its N_e tokens,

    F_e = Σ E_{y∼p(y|x)}[a aᵀ ⊗ g gᵀ]  ≈  (1 / N_e) (Σ a aᵀ) ⊗ (Σ E[g gᵀ])

(arXiv:2511.08968; Kronecker factors as in Laplace-LoRA, arXiv:2308.13111). ``kron`` keeps both sums, ``lowrank`` their best
bases of
rank k and the trace that these leave out, ``diag`` the diagonal Σ a² ⊗ E[g²]. All sums, nothing is averaged over a batch.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from effcore.errors import InputError
from effcore.methods.laplace_taps import LayerTokens, Tap
from effcore.ops.kronecker import Factor, grouped_gram, grouped_lowrank_update

HESSIANS = ("lowrank", "kron", "diag")


class LayerCurvature:
    """Sums of one layer. ``tensors`` is all of its state."""

    def __init__(self, tap: Tap, hessian: str, rank: int):
        weight = tap.weight
        self.hessian, self.name = hessian, tap.name
        self.experts, self.inputs, self.outputs = tap.experts, tap.inputs, tap.outputs
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(self.experts, *shape, dtype=dtype, device=weight.device)

        self.tensors = {"tokens": torch.zeros(self.experts, dtype=torch.int64, device=weight.device)}
        if hessian == "diag":
            self.tensors["diagonal"] = zeros(self.outputs, self.inputs)
            return
        for side, dim in (("input", self.inputs), ("output", self.outputs)):
            if hessian == "kron":
                self.tensors[f"{side}.sum"] = zeros(dim, dim)
            else:
                self.tensors[f"{side}.basis"] = zeros(dim, min(rank, dim))
                self.tensors[f"{side}.discarded"] = zeros()

    def update(self, layer: LayerTokens) -> None:
        """Adds a batch. Gradients of several y (weighted by the root of their probability) count as one token each in E[g
        gᵀ]."""
        state = self.tensors
        offsets, passes = layer.offsets, layer.gradients.shape[1]
        state["tokens"] += offsets.diff()
        if self.hessian == "diag":
            for e, (begin, end) in enumerate(pairwise(offsets.tolist())):
                if begin < end:
                    squares = layer.gradients[begin:end].to(state["diagonal"].dtype).square().sum(1)
                    state["diagonal"][e] += squares.mT @ layer.inputs[begin:end].to(squares.dtype).square()
            return
        rows = {
            "input": (layer.inputs.contiguous(), offsets),
            "output": (layer.gradients.flatten(0, 1).contiguous(), offsets * passes),
        }
        for side, (x, ends) in rows.items():
            if self.hessian == "kron":
                grouped_gram(x, ends, beta=1.0, out=state[f"{side}.sum"])
            else:
                basis, discarded = f"{side}.basis", f"{side}.discarded"
                state[basis], state[discarded] = grouped_lowrank_update(state[basis], state[discarded], x, ends)

    def factors(self) -> tuple[Factor, Factor]:
        """A and B in their eigenvectors, B divided by the tokens, so that F ≈ A ⊗ B. An expert without tokens has zeros."""
        a, b = self._factor("input"), self._factor("output")
        count = self.tensors["tokens"].clamp_min(1).to(b.values.dtype)
        return a, Factor(b.vectors, b.values / count[:, None], b.rest / count)

    def _factor(self, side: str) -> Factor:
        if self.hessian == "kron":
            values, vectors = torch.linalg.eigh(self.tensors[f"{side}.sum"])
            return Factor(vectors, values.clamp_min(0), values.new_zeros(self.experts))
        basis = self.tensors[f"{side}.basis"]
        if basis.shape[1] == basis.shape[2]:  # all of the space: also the directions in which there was no token
            values, vectors = torch.linalg.eigh(basis @ basis.mT)
            return Factor(vectors, values.clamp_min(0), values.new_zeros(self.experts))
        values = basis.square().sum(1)
        # Columns whose length is rounding alone are no directions.
        real = values > values.amax(1, keepdim=True) * 10 * torch.finfo(values.dtype).eps ** 1.5
        vectors = torch.where(real[:, None], basis / values.sqrt().clamp_min(1e-30)[:, None], 0)
        rest = self.tensors[f"{side}.discarded"] / (basis.shape[1] - basis.shape[2])
        return Factor(vectors, torch.where(real, values, 0), rest)


def check_rank(taps: list[Tap], hessian: str, rank: int) -> None:
    if hessian not in HESSIANS:
        raise InputError(f"effcore.laplace: hessian must be one of {', '.join(HESSIANS)}, got {hessian!r}")
    if hessian != "lowrank":
        return
    if rank < 1:
        raise InputError(f"effcore.laplace: rank must be at least 1, got {rank}")
    # A side that is narrower than the rank of a LoRA adapter keeps its full factor; one where both are is a mistake.
    for tap in taps:
        if rank > max(tap.inputs, tap.outputs):
            raise InputError(
                f"effcore.laplace: rank {rank} is above both dimensions of {tap.name} ({tap.outputs} x {tap.inputs})"
            )
