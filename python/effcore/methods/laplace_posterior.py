"""A Gaussian posterior over the weights of some layers, and what follows from it: evidence, samples, calibrated predictions.

For each expert's W: θ ∼ N(vec W_MAP, P⁻¹) with P = I / s² + F, F from :mod:`effcore.methods.laplace_curvature`. Logits are
linear in θ around the MAP, so that they are Gaussian too: N(f, Σ Gᵀ P⁻¹ G).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effcore.errors import InputError
from effcore.methods.laplace_file import read_safetensors, write_safetensors
from effcore.methods.laplace_layer import LayerPosterior
from effcore.methods.laplace_table import PriorTable, minimum, sampled
from effcore.methods.laplace_taps import Batch, LayerTokens, Tap, find_taps, gradients, listening, logits_of
from effcore.ops.kronecker import Factor


@dataclass
class Posterior:
    """What :func:`effcore.laplace` returns.

    Attributes:
        prior_variance: s² of each layer, [layers]. :meth:`fit_evidence` and :meth:`fit_heldout` set it.
        temperature: what :meth:`predict` divides logits by. :meth:`fit_heldout` sets it where it is asked to,
            and to 1 otherwise, as :meth:`fit_evidence` does.
        log_likelihood: of the training labels at the MAP, or None where batches had no labels.
        unrouted: for each layer, the experts that no token reached. They keep the prior variance.
    """

    model: nn.Module
    layers: list[LayerPosterior]
    hessian: str
    answers: Tensor | None
    classes: int
    prior_variance: Tensor
    prior_mean: str | dict[str, Tensor] = "map"
    log_likelihood: float | None = None
    examples: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0

    @property
    def taps(self) -> list[Tap]:
        """Where each layer of the posterior sits in the model."""
        return [layer.tap for layer in self.layers]

    @property
    def unrouted(self) -> dict[str, list[int]]:
        """Numbers of the experts that no token reached, by the layer's name; layers without such experts are left out."""
        found = {layer.tap.name: (layer.tokens == 0).nonzero()[:, 0].tolist() for layer in self.layers}
        return {name: experts for name, experts in found.items() if experts}

    # ---------------------------------------------------------------- evidence

    def log_evidence(self, prior_variance: Tensor | float | None = None) -> Tensor:
        """log p(labels) - ‖θ - θ₀‖² / (2 s²) - ½ Σ log det(I + s² F): 0-dim, differentiable in ``prior_variance``.

        Args:
            prior_variance: one number, or one a layer.

        Raises:
            InputError: without labels, or with ``prior_mean="map"``: then ‖θ - θ₀‖ is 0, and the evidence grows without end
                as s² falls to 0, whatever the data say.
        """
        if self.log_likelihood is None:
            raise InputError(
                "effcore.laplace: the evidence needs the labels of the training data, and batches had none"
            )
        if self.prior_mean == "map":
            raise InputError(
                'effcore.laplace: the evidence needs a prior mean other than the MAP (prior_mean="zero", or the weights before '
                "fine-tuning): around the MAP itself it always chooses s² = 0"
            )
        variance = self.prior_variance if prior_variance is None else prior_variance
        variance = torch.as_tensor(variance, dtype=torch.float64).expand(len(self.layers))
        terms = [self._evidence_of(i, s) for i, s in enumerate(variance)]
        return self.log_likelihood + torch.stack(terms).sum()

    def _evidence_of(self, i: int, variance: Tensor) -> Tensor:
        layer = self.layers[i]
        distance = layer.tap.weight.detach().double()
        if isinstance(self.prior_mean, Mapping):
            distance = distance - self.prior_mean[layer.tap.key].to(distance)
        wide = LayerPosterior(layer.tap, layer.tokens, _double(layer.factors), _double_tensor(layer.diagonal))
        return (-distance.square().sum() / (2 * variance) - wide.log_det(variance.to(distance.device)) / 2).cpu()

    def fit_evidence(self, *, per_layer: bool = False, bounds: tuple[float, float] = (1e-8, 1e4)) -> Posterior:
        """Sets the prior variance where the evidence is greatest: one for all layers, or one a layer; the
        temperature becomes 1. Returns itself."""
        self.log_evidence()  # refuses what it must
        self.temperature = 1.0  # the evidence is that of the model's own likelihood
        groups = [[i] for i in range(len(self.layers))] if per_layer else [list(range(len(self.layers)))]
        for group in groups:

            def loss(log_variance: float, group: list[int] = group) -> float:
                variance = torch.tensor(math.exp(log_variance), dtype=torch.float64)
                return -sum(float(self._evidence_of(i, variance)) for i in group)

            self.prior_variance[group] = math.exp(minimum(loss, math.log(bounds[0]), math.log(bounds[1])))
        return self

    def fit_heldout(
        self, loader: Any, *, per_layer: bool = False, temperature: bool = False, grid: Sequence[float] | None = None
    ) -> Posterior:
        """Sets the prior variance where the negative log-likelihood of labels that the fit has not seen is least.

        One pass over ``loader`` takes the covariances for every variance of the grid; the choice costs no more passes.

        Args:
            loader: batches with labels, of data other than that of the fit.
            per_layer: one variance a layer, by coordinate descent from the best shared one.
            temperature: together with a temperature T from 0.35 to 11: logits are N(f / T, Σ / T²) then. A prior variance near
                0 makes that temperature scaling.
            grid: candidate variances (default: 41 from 1e-8 to 1e4, evenly in the logarithm).
        """
        table = self.tabulate(loader, grid)
        choice = table.choose(per_layer=per_layer, temperature=temperature)
        self.prior_variance, self.temperature = table.variances[list(choice.variances)].clone(), choice.temperature
        return self

    def tabulate(self, loader: Any, grid: Sequence[float] | None = None) -> PriorTable:
        """One pass over ``loader``, batches with labels: its logits and what each layer adds to their covariance, for every
        prior variance of ``grid`` (default: 41 from 1e-8 to 1e4, evenly in the logarithm). The posterior stays as it is."""
        variances = torch.tensor(grid or torch.logspace(-8, 4, 41).tolist(), dtype=self.prior_variance.dtype)
        if not bool((variances > 0).all()):
            raise InputError("effcore.laplace: prior variances must be positive")
        means, covariances, labels = [], [], []
        for number, batch in enumerate(loader):
            mean, each = self._covariances(batch, variances, number)
            means.append(mean)
            covariances.append(each)
            labels.append(_checked_labels(batch, mean, number))
        if not means:
            raise InputError("effcore.laplace: the held-out loader is empty")
        return PriorTable(variances, torch.cat(means), torch.cat(covariances, 2), torch.cat(labels))

    # ---------------------------------------------------------------- prediction

    def logit_distribution(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(mean [B, C], covariance [B, C, C])`` of a batch's logits, before the temperature."""
        mean, each = self._covariances(batch, None, 0)
        return mean, each.sum(0)[0]

    def predict(self, batch: Batch, *, method: str = "sampling", samples: int = 1000, seed: int = 0) -> Tensor:
        """Probabilities [B, C] of a batch.

        Args:
            method: "sampling": the mean of the softmax over ``samples`` draws of the logits; "probit": softmax(f / √(1 + π v
                / 8)) with v the variance of each logit (MacKay 1992), with no draws.
        """
        mean, covariance = self.logit_distribution(batch)
        mean, covariance = mean / self.temperature, covariance / self.temperature**2
        if method == "probit":
            variance = covariance.diagonal(dim1=1, dim2=2)
            return (mean / (1 + math.pi / 8 * variance).sqrt()).softmax(-1)
        if method != "sampling":
            raise InputError(f'effcore.laplace: method must be "sampling" or "probit", got {method!r}')
        return sampled(mean, covariance, samples, seed)

    def _covariances(self, batch: Batch, variances: Tensor | None, number: int) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and each layer's covariances [layers, S, B, C, C] (S = 1: with its own prior variance)."""
        with listening(self.model, self.taps), torch.enable_grad():
            logits = logits_of(self.model, batch, self.answers)
            examples, classes = logits.shape
            if classes != self.classes:
                raise InputError(
                    f"effcore.laplace: the model gives {classes} classes, the posterior was fitted to {self.classes}"
                )
            cotangents = torch.eye(classes, dtype=logits.dtype, device=logits.device)[:, None].expand(-1, examples, -1)
            unknown = any(tap.record is None or tap.record.token is None for tap in self.taps)
            if unknown:  # one more pass tells examples apart: their gradients come multiplied by their number
                numbers = torch.arange(1, examples + 1, dtype=logits.dtype, device=logits.device)
                cotangents = torch.cat([cotangents, (numbers[:, None] * _mix(classes, logits))[None]])
            layers = gradients(logits, cotangents, self.taps, number)
        each = []
        for i, (posterior, layer) in enumerate(zip(self.layers, layers, strict=True)):
            example = _example(layer, examples, classes, posterior.tap.name)
            layer.gradients = layer.gradients[:, :classes]
            own = self.prior_variance[i : i + 1] if variances is None else variances
            each.append(posterior.covariance(layer, example, examples, own.to(logits.device)))
        return logits.detach(), torch.stack([e.to(logits.dtype) for e in each])

    # ---------------------------------------------------------------- weights

    def sample(self, *, seed: int | None = None) -> dict[str, Tensor]:
        """One draw of the weights, by parameter name: for ``torch.func.functional_call(model, sample, ...)``."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return {
            layer.tap.key: layer.sample(s.to(layer.tap.weight.device), generator)
            for layer, s in zip(self.layers, self.prior_variance, strict=True)
        }

    def save(self, path: str | Path) -> None:
        """One safetensors file, complete or not there at all. The model's weights are not in it."""
        tensors = {"prior_variance": self.prior_variance}
        if self.answers is not None:
            tensors["answers"] = self.answers
        for layer in self.layers:
            tensors[f"{layer.tap.key}/tokens"] = layer.tokens
            if layer.diagonal is not None:
                tensors[f"{layer.tap.key}/diagonal"] = layer.diagonal
            for side, factor in zip(("input", "output"), layer.factors or (), strict=False):
                tensors |= {f"{layer.tap.key}/{side}.{part}": t for part, t in factor._asdict().items()}
        if isinstance(self.prior_mean, Mapping):
            tensors |= {f"{key}/prior_mean": t for key, t in self.prior_mean.items()}
        about = {
            "format": "effcore laplace 1",
            "hessian": self.hessian,
            "layers": [layer.tap.name for layer in self.layers],
            "classes": self.classes,
            "prior_mean": "tensors" if isinstance(self.prior_mean, Mapping) else self.prior_mean,
            "log_likelihood": self.log_likelihood,
            "examples": self.examples,
            "settings": self.settings,
            "temperature": self.temperature,
        }
        write_safetensors(Path(path), tensors, about)

    @staticmethod
    def load(path: str | Path, model: nn.Module) -> Posterior:
        """The posterior of a file, on a model with the weights that it was fitted to."""
        tensors, about = read_safetensors(Path(path))
        if about.get("format") != "effcore laplace 1":
            raise InputError(f"{path}: not a posterior that effcore wrote")
        layers = []
        for tap in find_taps(model, about["layers"]):
            mine = {
                k.split("/", 1)[1]: t.to(tap.weight.device) for k, t in tensors.items() if k.startswith(f"{tap.key}/")
            }
            if "tokens" not in mine or len(mine["tokens"]) != tap.experts:
                raise InputError(
                    f"{path}: {tap.name} has {tap.experts} experts in the model, another number in the file"
                )
            factors = None
            if about["hessian"] != "diag":
                a, b = (Factor(*(mine[f"{side}.{part}"] for part in Factor._fields)) for side in ("input", "output"))
                factors = a, b
                if (a.vectors.shape[1], b.vectors.shape[1]) != (tap.inputs, tap.outputs):
                    raise InputError(
                        f"{path}: {tap.name} is {tap.outputs} x {tap.inputs} in the model but "
                        f"{b.vectors.shape[1]} x {a.vectors.shape[1]} in the file"
                    )
            layers.append(LayerPosterior(tap, mine["tokens"], factors, mine.get("diagonal")))
        means = {k.rsplit("/", 1)[0]: t for k, t in tensors.items() if k.endswith("/prior_mean")}
        return Posterior(
            model,
            layers,
            about["hessian"],
            tensors.get("answers"),
            about["classes"],
            tensors["prior_variance"],
            means if about["prior_mean"] == "tensors" else about["prior_mean"],
            about["log_likelihood"],
            about["examples"],
            about["settings"],
            about.get("temperature", 1.0),  # older files have none
        )


# ---------------------------------------------------------------- pieces


def _double_tensor(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def _double(factors: tuple[Factor, Factor] | None) -> tuple[Factor, Factor] | None:
    if factors is None:
        return None
    a, b = (Factor(*(t.double() for t in factor)) for factor in factors)
    return a, b


def _mix(classes: int, like: Tensor) -> Tensor:
    """A combination of classes in which no gradient is lost."""
    return torch.linspace(1.0, 2.0, classes, dtype=like.dtype, device=like.device).cos() + 1.5


def _example(layer: LayerTokens, examples: int, classes: int, name: str) -> Tensor:
    """Which example each token belongs to: from its place, or from gradients that came multiplied by the example's number."""
    if layer.record.token is not None:
        return layer.record.example(examples, name)[layer.kept]
    plain = torch.einsum("tco,c->to", layer.gradients[:, :classes].double(), _mix(classes, layer.gradients).double())
    scaled = layer.gradients[:, classes].double()
    number = (plain * scaled).sum(1) / plain.square().sum(1)
    if not bool(((number - number.round()).abs() < 0.1).all()):
        raise InputError(f"effcore.laplace: examples of a batch are not independent at {name}; use batches of one")
    return (number.round().long() - 1).clamp(0, examples - 1)


def _checked_labels(batch: Batch, mean: Tensor, number: int) -> Tensor:
    from effcore.methods.laplace_taps import labels_of

    labels = labels_of(batch)
    if labels is None:
        raise InputError(f"effcore.laplace: batch {number} has no labels")
    check_labels(labels, *mean.shape, number=number)
    return labels.to(mean.device)


def check_labels(labels: Tensor, examples: int, classes: int, *, number: int) -> None:
    if labels.shape != (examples,) or labels.is_floating_point():
        raise InputError(
            f"effcore.laplace: labels of batch {number} must be integers [{examples}] "
            f"but are {labels.dtype} {list(labels.shape)}"
        )
    if examples and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise InputError(
            f"effcore.laplace: labels of batch {number} go from {int(labels.min())} to {int(labels.max())}, "
            f"but the model gives {classes} classes"
        )
