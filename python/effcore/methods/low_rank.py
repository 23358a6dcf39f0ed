r"""Low-rank decomposition that is really faster (arXiv 2407.20266, 2309.03824).

Linear layers, Hugging Face's Conv1D and 1×1 convolutions become two factors by truncated SVD, k×k convolutions three by
Tucker-2 with HOOI. Where a few batches are given, singular values are weighted by the inputs' second moments, layers are timed
on the shapes that they see, ranks go to the fast side of the steps that kernels have, and a layer stays dense where its factors
would be slower.

    model = effcore.decompose(model, ratio=2.0, data=batches)
    print(effcore.methods.low_rank.report(model).table())
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from time import perf_counter
from typing import Any, get_args

import torch
from torch import nn

from effcore.errors import nearest
from effcore.methods._surroundings import random_state_kept
from effcore.methods._tracked import Progress, tracked
from effcore.methods.low_rank_factor import relative_error
from effcore.methods.low_rank_layers import Layer, Rank, find, replace
from effcore.methods.low_rank_measure import Seen, observe
from effcore.methods.low_rank_ranks import Choice, Measure, Timer, by_error, by_ratio, by_time
from effcore.methods.low_rank_report import DecompositionReport, LayerReport

__all__ = ["decompose", "report"]

_REPORT = "_effcore_low_rank"


def decompose(
    model: nn.Module,
    ratio: float | None = None,
    *,
    error: float | None = None,
    time: float | None = None,
    ranks: Mapping[str, Rank] | None = None,
    data: Iterable[Any] | None = None,
    weighted: bool = True,
    measure: Measure | None = "inference",
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    multiple: int | None = None,
    inplace: bool = True,
    progress: Progress | None = None,
) -> nn.Module:
    """Replaces a model's linear and convolution layers by factors of low rank.

    Exactly one target:

    Args:
        ratio: parameters of each layer fall by this factor (2407.20266's formulas for the ranks).
        error: each layer's relative error, ‖W − Ŵ‖ / ‖W‖ (of the outputs, with ``data``), is at most this; layers for which
            factors of that rank are no smaller stay dense.
        time: the layers' measured time together falls to this fraction, with the least sum of squared errors. Needs ``data``.
        ranks: layer name -> rank, or (r1, r2) for a k×k convolution. The other layers stay.

    And:
        data: a few batches, each a mapping (``model(**batch)``), a sequence (``model(*batch)``) or a tensor.
        weighted: with ``data``, weight singular values by the inputs' second moments.
        measure: with ``data``, time layers for inference, for training, for training with the outer factors frozen
            ("freezing", as :class:`~effcore.methods.low_rank_callbacks.Freezing` does), or (None) do not.
        include, exclude: regular expressions searched for in layer names.
        multiple: ranks are multiples of this (default: what this device's kernels like; 1: the paper's ranks).
        inplace: False leaves the model as it is and returns a copy.
        progress: called with ("ranks" or "factors", layers done, layers) after each layer.

    Returns:
        The model. :func:`report` tells what became of each layer.

    Raises:
        ValueError: not one target, a target out of range, a model without dense layers, an unknown layer, a rank that a layer
            cannot have, weights that are quantised, sparse or not finite, or a shared (tied) weight that was asked for by
            name. Tied weights that were not asked for stay dense and tied.
    """
    target = _target(ratio, error, time, ranks)
    if time is not None and data is None:
        raise ValueError("effcore.decompose: time needs data: batches that show which shapes the layers see")
    if time is not None and measure is None:
        raise ValueError("effcore.decompose: time needs measure to be 'inference', 'training' or 'freezing'")
    if measure not in (None, *get_args(Measure)):
        raise ValueError(
            f"effcore.decompose: measure must be 'inference', 'training', 'freezing' or None, got {measure!r}"
        )
    if multiple is not None and multiple < 1:
        raise ValueError(f"effcore.decompose: multiple must be positive, got {multiple}")
    if not inplace:
        model = copy.deepcopy(model)
    if ranks is not None:
        include = [f"^{re.escape(name)}$" for name in ranks]
        _known(model, ranks)
    layers, stay = find(model, include, exclude)
    if not layers and not stay:
        raise ValueError(f"effcore.decompose: {type(model).__name__} has no dense linear or convolution layer")
    before = sum(p.numel() for p in model.parameters())
    at = [perf_counter()]

    seen: dict[str, Seen] | None = None
    with random_state_kept(model):
        if data is not None:
            seen = observe(model, layers, data, moments=weighted)
        moments = {name: s.moments for name, s in (seen or {}).items()} if weighted else {}
        at.append(perf_counter())
        timer = Timer(seen if measure is not None else None, measure)
        if ratio is not None:
            choices = by_ratio(tracked(layers, "ranks", progress), ratio, multiple, timer)
        elif error is not None:
            choices = by_error(tracked(layers, "ranks", progress), error, moments, multiple, timer)
        elif time is not None:
            choices = by_time(tracked(layers, "ranks", progress), time, moments, multiple, timer)
        else:
            assert ranks is not None
            choices = [_given(layer, ranks[layer.name], timer) for layer in tracked(layers, "ranks", progress)]

        at.append(perf_counter())
        rows = [
            _apply(model, choice, moments.get(choice.layer.name)) for choice in tracked(choices, "factors", progress)
        ]
    at.append(perf_counter())
    result = DecompositionReport(target, rows, before, sum(p.numel() for p in model.parameters()))
    result.seconds = dict(zip(("batches", "ranks", "factors"), (b - a for a, b in pairwise(at)), strict=True))
    for name, why in stay.items():
        weight = model.get_submodule(name).weight
        n = weight.numel() if isinstance(weight, torch.Tensor) else 0
        shape = list(weight.shape) if isinstance(weight, torch.Tensor) else []
        rows.append(LayerReport(name, type(model.get_submodule(name)).__name__, shape, None, n, n, note=why))
    setattr(model, _REPORT, result)
    return model


def report(model: nn.Module) -> DecompositionReport:
    """What :func:`decompose` did to this model last.

    Raises:
        ValueError: nothing did.
    """
    result = getattr(model, _REPORT, None)
    if result is None:
        raise ValueError("effcore.methods.low_rank.report: this model was not decomposed")
    return result


def _target(ratio: Any, error: Any, time: Any, ranks: Any) -> str:
    given = {n: v for n, v in (("ratio", ratio), ("error", error), ("time", time), ("ranks", ranks)) if v is not None}
    if len(given) != 1:
        what = ", ".join(given) or "none"
        raise ValueError(f"effcore.decompose: give one of ratio, error, time and ranks, got {what}")
    ((name, value),) = given.items()
    if name == "ranks":
        return "given ranks"
    if not (isinstance(value, int | float) and math.isfinite(value)):
        raise ValueError(f"effcore.decompose: {name} must be a finite number, got {value!r}")
    if name == "ratio" and value <= 1:
        raise ValueError(f"effcore.decompose: ratio must be above 1, got {value}")
    if name in ("error", "time") and not 0 < value < 1:
        raise ValueError(f"effcore.decompose: {name} must be between 0 and 1, got {value}")
    return f"{name} {value}"


def _known(model: nn.Module, ranks: Mapping[str, Rank]) -> None:
    names = [name for name, _ in model.named_modules()]
    for name in ranks:
        if name not in names:
            raise ValueError(
                f"effcore.decompose: ranks names {name!r}, which the model does not have{nearest(name, names)}"
            )


def _given(layer: Layer, rank: Rank, timer: Timer) -> Choice:
    layer.check(rank)
    if timer and timer.seen is not None and layer.name in timer.seen:
        return Choice(layer, rank, "", timer.dense(layer), timer.at(layer, rank))
    return Choice(layer, rank)


def _apply(model: nn.Module, choice: Choice, moments: torch.Tensor | None) -> LayerReport:
    """Builds and places one layer's factors; errors are measured on what was placed."""
    layer, n = choice.layer, choice.layer.parameters
    row = LayerReport(layer.name, layer.kind, list(layer.weight.shape), choice.rank, n, n, note=choice.note)
    row.ms_before, row.ms_after = choice.dense_ms, choice.ms
    if choice.rank is None:
        return row
    new = layer.build(choice.rank, layer.factors(moments))
    weight = new.weight[:, :, 0, 0] if layer.kind == "pointwise" else new.weight
    row.error = relative_error(layer.weight, weight)
    row.output_error = None if moments is None else relative_error(layer.weight, weight, moments)
    row.parameters_after = layer.parameters_at(choice.rank)
    replace(model, layer.name, new)
    return row
