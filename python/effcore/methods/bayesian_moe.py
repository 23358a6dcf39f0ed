"""Bayesian mixture of experts (arXiv:2511.08968): a Laplace posterior over the second matrix of each expert of a trained model.

Nothing is trained again and no parameter is added: one pass over the training data gathers each expert's Fisher matrix,
Kronecker factored and of low rank; predictions then average over the weights that the data leave possible, which makes their
probabilities honest. Where the paper is silent (factors, prior, evidence) this follows Laplace-LoRA (arXiv:2308.13111);
docs/bayesian-moe.md says where, and why.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effcore.errors import InputError
from effcore.methods.laplace_curvature import LayerCurvature, check_rank
from effcore.methods.laplace_file import read_safetensors, write_safetensors
from effcore.methods.laplace_layer import LayerPosterior
from effcore.methods.laplace_posterior import Posterior, check_labels
from effcore.methods.laplace_taps import Batch, Tap, find_taps, gradients, labels_of, listening, logits_of

__all__ = ["Posterior", "laplace"]


def laplace(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    targets: str | Sequence[str] = "experts",
    hessian: str = "lowrank",
    rank: int = 10,
    fisher: str = "exact",
    answers: Sequence[int] | Tensor | None = None,
    prior_mean: str | Mapping[str, Tensor] = "map",
    prior_variance: float = 1e-2,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 50,
    keep_checkpoint: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Posterior:
    """Fits a posterior to a trained model's experts (or other linear layers), in one pass over its training data.

    Args:
        model: any module whose forward gives logits [B, classes], or a causal language model together with ``answers``.
            Experts may be stacked parameters of transformers (Qwen2-MoE, Mixtral, DeepSeek and others of its experts
            interface) or linear layers under a module called ``experts``. The model is left as it was, its weights untouched.
        loader: batches, each a mapping of the model's inputs (``labels`` [B], where given, are class numbers and do not go to
            the model) or a pair ``(x, labels)``. Examples of a batch must not depend on each other.
        targets: "experts", "lora" (the adapters' matrices), "last" (the output layer), or a list of module names. Biases keep
            their values.
        hessian: "lowrank" (rank ``rank`` on both sides, and the mean of what that leaves out), "kron" (full factors) or "diag".
        fisher: "exact": the expectation over the classes, one backward pass each; "sampled": one class drawn from the model's
            own prediction, one pass.
        answers: token ids of the classes; the logits are those behind the last token of each row.
        prior_mean: "map", "zero", or tensors by parameter name (the weights before fine-tuning). The evidence needs one of the
            latter.
        prior_variance: s², until :meth:`Posterior.fit_heldout` or :meth:`Posterior.fit_evidence` chooses it.
        checkpoint: a file that takes the state every ``checkpoint_every`` batches. Where it exists the fit goes on behind the
            batches that it has seen, after checking that the loader gives the same ones; a finished fit removes it.
        keep_checkpoint: a finished fit leaves it, whole: the next call with the same batches takes it as it is.
        progress: called with the batches done and their number, or None where the loader has no length.

    Returns:
        The posterior. An expert that no token reached keeps the prior variance, and is listed in ``posterior.unrouted``.

    Raises:
        InputError: naming what is wrong. A fit that fails returns nothing, and its checkpoint is that of the last complete
        batch.
    """
    taps = find_taps(model, targets)
    check_rank(taps, hessian, rank)
    if fisher not in ("exact", "sampled"):
        raise InputError(f'effcore.laplace: fisher must be "exact" or "sampled", got {fisher!r}')
    if not prior_variance > 0:
        raise InputError(f"effcore.laplace: prior_variance must be positive, got {prior_variance}")
    answer_ids = _checked_answers(answers)
    fit = _Fit(model, taps, hessian, rank, fisher, answer_ids, seed)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        fit.restore(path)
    fit.run(loader, path, checkpoint_every, progress)
    if path is not None and keep_checkpoint:
        fit.save(path)
    posterior = fit.posterior(_checked_mean(prior_mean, taps), prior_variance)
    if path is not None and not keep_checkpoint:
        path.unlink(missing_ok=True)
    return posterior


class _Fit:
    """The state of a pass over the data: sums, and which batches they hold."""

    def __init__(
        self, model: nn.Module, taps: list[Tap], hessian: str, rank: int, fisher: str, answers: Tensor | None, seed: int
    ):
        self.model, self.taps, self.answers, self.fisher = model, taps, answers, fisher
        self.settings = {"hessian": hessian, "rank": rank, "fisher": fisher, "seed": seed}
        self.curvature = [LayerCurvature(tap, hessian, rank) for tap in taps]
        self.batches = self.examples = self.classes = 0
        self.log_likelihood: float | None = 0.0
        self.digest = ""

    def run(
        self,
        loader: Iterable[Batch],
        path: Path | None,
        every: int,
        progress: Callable[[int, int | None], None] | None,
    ) -> None:
        total = len(loader) if hasattr(loader, "__len__") else None  # type: ignore[arg-type]
        seen, digest, done = 0, "", self.batches
        for batch in loader:
            digest = _chain(digest, batch) if path is not None else ""
            seen += 1
            if seen <= done:  # a resumed fit has these already
                if seen == done and digest != self.digest:
                    raise InputError(
                        f"{path}: the loader gives other batches than those of the interrupted fit; does it shuffle?"
                    )
                continue
            self.add(batch)
            self.digest = digest
            if progress is not None:
                progress(self.batches, total)
            if path is not None and self.batches % every == 0:
                self.save(path)
        if seen == 0:
            raise InputError("effcore.laplace: the loader is empty")
        if seen < done:
            raise InputError(f"{path}: the interrupted fit had seen {done} batches, but the loader has {seen}")

    def add(self, batch: Batch) -> None:
        """One batch: nothing is added before all of its gradients are known to be good."""
        number = self.batches
        with listening(self.model, self.taps), torch.enable_grad():
            logits = logits_of(self.model, batch, self.answers)
            examples, classes = logits.shape
            if self.classes and classes != self.classes:
                raise InputError(
                    f"effcore.laplace: batch {number} has {classes} classes, the ones before had {self.classes}"
                )
            labels = labels_of(batch)
            if labels is not None:
                check_labels(labels, examples, classes, number=number)
            log_probabilities = logits.detach().log_softmax(-1)
            layers = gradients(logits, self._cotangents(log_probabilities.exp()), self.taps, number)
        for curvature, layer in zip(self.curvature, layers, strict=True):
            curvature.update(layer)
        self.classes = classes
        self.batches += 1
        self.examples += examples
        if labels is None or self.log_likelihood is None:
            self.log_likelihood = None
        else:
            chosen = log_probabilities.gather(1, labels.to(logits.device)[:, None])
            self.log_likelihood += float(chosen.double().sum())

    def _cotangents(self, p: Tensor) -> Tensor:
        """[C, B, classes]: gradients of -log p(y) by the logits, p - e_y, for each y weighted by √p(y), or for one drawn y."""
        classes = p.shape[1]
        if self.fisher == "exact":
            identity = torch.eye(classes, dtype=p.dtype, device=p.device)
            return p.mT.sqrt()[:, :, None] * (p[None] - identity[:, None])
        generator = torch.Generator().manual_seed(self.settings["seed"] * 1_000_003 + self.batches)  # type: ignore[operator]
        drawn = torch.multinomial(p.cpu().double(), 1, generator=generator)[:, 0].to(p.device)
        return (p - torch.nn.functional.one_hot(drawn, classes))[None]

    def posterior(self, prior_mean: str | dict[str, Tensor], prior_variance: float) -> Posterior:
        layers = []
        for tap, curvature in zip(self.taps, self.curvature, strict=True):
            tokens = curvature.tensors["tokens"]
            if curvature.hessian == "diag":
                layers.append(LayerPosterior(tap, tokens, diagonal=curvature.tensors["diagonal"]))
            else:
                layers.append(LayerPosterior(tap, tokens, factors=curvature.factors()))
        return Posterior(
            self.model,
            layers,
            str(self.settings["hessian"]),
            self.answers,
            self.classes,
            torch.full((len(layers),), prior_variance, dtype=torch.float64),
            prior_mean,
            self.log_likelihood,
            self.examples,
            dict(self.settings),
        )

    # ---------------------------------------------------------------- interrupted fits

    def save(self, path: Path) -> None:
        tensors = {f"{c.name}/{key}": t for c in self.curvature for key, t in c.tensors.items()}
        about = {
            "format": "effcore laplace fit 1",
            "settings": self.settings,
            "batches": self.batches,
            "examples": self.examples,
            "classes": self.classes,
            "log_likelihood": self.log_likelihood,
            "digest": self.digest,
        }
        write_safetensors(path, tensors, about)

    def restore(self, path: Path) -> None:
        tensors, about = read_safetensors(path)
        expected = {f"{c.name}/{key}": t.shape for c in self.curvature for key, t in c.tensors.items()}
        if about.get("format") != "effcore laplace fit 1":
            raise InputError(f"{path}: not the checkpoint of a fit")
        if about["settings"] != self.settings or {k: t.shape for k, t in tensors.items()} != expected:
            raise InputError(
                f"{path}: the checkpoint of a fit with other settings ({about['settings']}); remove it to begin anew"
            )
        for c in self.curvature:
            c.tensors = {key: tensors[f"{c.name}/{key}"].to(t.device) for key, t in c.tensors.items()}
        self.batches, self.examples, self.classes = about["batches"], about["examples"], about["classes"]
        self.log_likelihood, self.digest = about["log_likelihood"], about["digest"]


def _chain(digest: str, batch: Batch) -> str:
    """A fingerprint of all batches so far."""
    state = hashlib.sha256(digest.encode())
    items: list[tuple[str, Any]] = sorted(batch.items()) if isinstance(batch, Mapping) else [("", t) for t in batch]
    for name, t in items:
        state.update(name.encode())
        if isinstance(t, Tensor):
            state.update(str((t.dtype, tuple(t.shape))).encode())
            state.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return state.hexdigest()


def _checked_answers(answers: Sequence[int] | Tensor | None) -> Tensor | None:
    if answers is None:
        return None
    ids = torch.as_tensor(answers, dtype=torch.long).flatten()
    if len(ids) < 2 or len(ids.unique()) != len(ids) or int(ids.min()) < 0:
        raise InputError(f"effcore.laplace: answers must be at least two different token ids, got {ids.tolist()}")
    return ids


def _checked_mean(prior_mean: str | Mapping[str, Tensor], taps: list[Tap]) -> str | dict[str, Tensor]:
    if isinstance(prior_mean, str):
        if prior_mean not in ("map", "zero"):
            raise InputError(f'effcore.laplace: prior_mean must be "map", "zero" or tensors, got {prior_mean!r}')
        return prior_mean
    for tap in taps:
        if tap.key not in prior_mean or prior_mean[tap.key].shape != tap.weight.shape:
            raise InputError(f"effcore.laplace: prior_mean must have {tap.key} with shape {list(tap.weight.shape)}")
    return {tap.key: prior_mean[tap.key].detach() for tap in taps}
