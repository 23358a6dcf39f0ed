"""Which decomposed layers of a ResNet save less than their roofline says, and the kernels that take the time.

Layers with ranks from a file of `speed`, each by itself, forward and backward; those of one shape are one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.claims import _low_rank_resnet as claim
from benchmarks.claims import _low_rank_roofline as roofline
from benchmarks.claims._kernels import of_a_step
from benchmarks.claims._low_rank_worker import Spec, any_basis
from effcore.methods import low_rank, low_rank_factor
from effcore.methods.low_rank_layers import Layer, find, freeze
from effcore.methods.low_rank_measure import observe, shape_key
from effcore.methods.low_rank_ranks import Timer


def short(ranks: dict[str, dict[str, Any]], batch: int) -> Iterator[dict[str, Any]]:
    """A row for each shape and rank, those that fall most short first, of each variant in ``ranks``."""
    rates = claim.rates_of("cuda")
    for key, of in ranks.items():
        model, what, variant = key.split(" ", 2)
        if what != "training" or variant not in ("timed ranks", "timed ranks, freezing"):
            continue
        wanted = {name: tuple(r) if isinstance(r, list) else r for name, r in of.items()}
        spec = Spec(int(model.removeprefix("ResNet-")), variant, True, "cuda", batch)
        dense, x = claim._dense(spec)
        layers = {layer.name: layer for layer in find(dense, None)[0] if layer.name in wanted}
        seen = observe(dense, list(layers.values()), [x], moments=False)
        timer = Timer(seen, "freezing" if "freezing" in variant else "training")
        before = roofline.layers(dense, x, True, rates)
        with mock.patch.object(low_rank_factor, "_leading", any_basis):  # times do not depend on the weights
            low_rank.decompose(dense, ranks=wanted)
        if timer.frozen:
            freeze(dense)
        after = roofline.layers(dense, x, True, rates)
        rows: dict[Any, dict[str, Any]] = {}
        for name, layer in layers.items():
            predicted = before[name] - sum(s for n, s in after.items() if n == name or n.startswith(f"{name}."))
            same = (shape_key(layer), wanted[name], seen[name].shape)
            if same not in rows:
                rows[same] = _row(layer, wanted[name], timer) | {
                    "model": model,
                    "variant": variant,
                    "layers": 0,
                    "ms_predicted": 0.0,
                }
            rows[same]["layers"] += 1
            rows[same]["ms_predicted"] += predicted * 1e3
        for row in sorted(rows.values(), key=_shortfall, reverse=True):
            saved = f"{_saved(row):.3f} ms of {row['ms_predicted']:.3f}"
            print(f"{key}: {row['layers']} of {row['weight']} at {row['rank']} save {saved}", flush=True)
            yield row


def _saved(row: dict[str, Any]) -> float:
    return row["layers"] * (row["ms_dense"] - row["ms"])


def _shortfall(row: dict[str, Any]) -> float:
    return row["ms_predicted"] - _saved(row)


def _row(layer: Layer, rank: Any, timer: Timer) -> dict[str, Any]:
    assert timer.seen is not None
    seen = timer.seen[layer.name]
    factors = layer.empty(rank)
    if timer.frozen:
        freeze(factors)
    x = (
        torch.randn(seen.shape, device="cuda", dtype=layer.weight.dtype)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
    )

    def steps(module: Any) -> Any:
        trained = [x, *(p for p in module.parameters() if p.requires_grad)]

        def run(count: int) -> None:
            for _ in range(count):
                out = module(x)
                torch.autograd.grad(out, trained, out)
            torch.cuda.synchronize()

        return run

    kernels = {what: of_a_step(steps(module), 3) for what, module in (("dense", layer.module), ("factors", factors))}
    row = {"weight": list(layer.weight.shape), "rank": rank, "input": list(seen.shape), "kernels": kernels}
    return row | {"ms_dense": timer.dense(layer), "ms": timer.at(layer, rank)}
