"""One layer's share of a Laplace posterior: its determinant, the covariance of logits that it gives, draws of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from effcore.methods.laplace_taps import LayerTokens, Tap
from effcore.ops.kronecker import Factor, kron_log_det, kron_variance


@dataclass
class LayerPosterior:
    """One layer's share: its Fisher matrix as two factors or as a diagonal, and the MAP it is centred on."""

    tap: Tap
    tokens: Tensor  # int64 [E]
    factors: tuple[Factor, Factor] | None = None
    diagonal: Tensor | None = None  # [E, O, I]

    def log_det(self, prior_variance: Tensor) -> Tensor:
        """Σₑ log det(I + s² Fₑ)"""
        if self.factors is None:
            assert self.diagonal is not None
            return torch.log1p(prior_variance * self.diagonal).sum()
        return kron_log_det(*self.factors, prior_variance).sum()

    def covariance(self, layer: LayerTokens, example: Tensor, examples: int, prior_variance: Tensor) -> Tensor:
        """[S, B, C, C] for a list of prior variances [S]."""
        if self.factors is not None:
            dtype = self.factors[0].values.dtype
            return kron_variance(
                layer.inputs.to(dtype), layer.gradients.to(dtype), layer.offsets, example, examples, *self.factors,
                prior_variance,
            )  # fmt: skip
        assert self.diagonal is not None
        classes = layer.gradients.shape[1]
        result = self.diagonal.new_zeros((len(prior_variance), examples, classes, classes))
        for e, (begin, end) in enumerate(pairwise(layer.offsets.tolist())):
            for b in example[begin:end].unique().tolist():
                rows = (example[begin:end] == b).nonzero()[:, 0] + begin
                g, a = layer.gradients[rows].to(result.dtype), layer.inputs[rows].to(result.dtype)
                total = torch.einsum("tco,ti->coi", g, a)
                for s, variance in enumerate(prior_variance):
                    weighted = total / (1 / variance + self.diagonal[e])
                    result[s, b] += torch.einsum("coi,doi->cd", weighted, total)
        return result

    def sample(self, prior_variance: Tensor, generator: torch.Generator | None) -> Tensor:
        """W_MAP + P^(-1/2) ε in the layout of the parameter."""
        mean = self.tap.matrices()
        dtype = (self.diagonal if self.factors is None else self.factors[0].values).dtype  # type: ignore[union-attr]
        noise = torch.randn(
            mean.shape, generator=generator, dtype=dtype, device=generator.device if generator else None
        )
        noise = noise.to(mean.device)
        if self.factors is None:
            assert self.diagonal is not None
            noise = noise * (1 / prior_variance + self.diagonal).rsqrt()
        else:
            (u, alpha, alpha_rest), (v, beta, beta_rest) = self.factors

            def scale(left: Tensor, right: Tensor) -> Tensor:
                return (1 / prior_variance + left * right).rsqrt()

            right, left = noise @ u, v.mT @ noise  # [E, O, ka], [E, kb, I]
            both = v.mT @ right
            right, left, outside = (
                right - v @ both,
                left - both @ u.mT,
                noise - v @ left - right @ u.mT + v @ (both @ u.mT),
            )
            noise = (
                v @ (both * scale(alpha[:, None, :], beta[:, :, None])) @ u.mT
                + (right * scale(alpha, beta_rest[:, None])[:, None, :]) @ u.mT
                + v @ (left * scale(beta, alpha_rest[:, None])[:, :, None])
                + outside * scale(alpha_rest, beta_rest)[:, None, None]
            )
        weight = (mean + noise.to(mean.dtype)).mT if self.tap.transposed else mean + noise.to(mean.dtype)
        return weight if self.tap.stacked else weight[0]
