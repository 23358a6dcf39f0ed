"""Which rank each layer gets: by ratio, by error or by measured time; dense wherever that is faster.

The paper times ranks downward and stops at the step in time. Its formula, argmax over r of t(r + 1) − t(r), names the rank
*above* which time jumps, and with noise any rank; here candidates are snapped to the multiples that kernels are made for, times
are medians, and the chosen rank is the one that does the most work a millisecond: the rank right under a step, where there is
one within reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from effcore.methods.low_rank_factor import KernelFactors, MatrixFactors, relative_error
from effcore.methods.low_rank_layers import Layer, Rank, freeze
from effcore.methods.low_rank_measure import Clock, Seen, shape_key

SLACK = 1.03  # rates closer than this count as equal: the greater rank is kept, and a dense layer stays
WINDOW = 0.75  # how far below the wanted rank the search for a faster one goes
Measure = Literal["inference", "training", "freezing"]
RATIOS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)  # candidates of a search by time


@dataclass
class Choice:
    """What becomes of one layer; rank None: it stays dense, and ``note`` says why."""

    layer: Layer
    rank: Rank | None
    note: str = ""
    dense_ms: float | None = None  # of all calls in one forward pass
    ms: float | None = None


def snap(rank: Rank, multiple: int) -> Rank:
    """Down to a multiple, but not to nothing; small ranks keep a smaller power of two."""
    if isinstance(rank, tuple):
        return int(snap(rank[0], multiple)), int(snap(rank[1], multiple))  # type: ignore[arg-type]
    while multiple > 1 and rank < 2 * multiple:
        multiple //= 2
    return rank // multiple * multiple


def _scaled(rank: Rank, factor: float) -> Rank:
    return (int(rank[0] * factor), int(rank[1] * factor)) if isinstance(rank, tuple) else int(rank * factor)


def _positive(rank: Rank) -> bool:
    return min(rank) >= 1 if isinstance(rank, tuple) else rank >= 1


def default_multiple(layer: Layer) -> int:
    """Tensor cores of a GPU like 64 columns of a product, of convolutions too; vectors of a processor like 8 to 16."""
    return 64 if layer.weight.is_cuda else 16


class Timer:
    """Times of one model's layers, for inference, training, or training with the outer factors frozen."""

    def __init__(self, seen: Mapping[str, Seen] | None, measure: Measure | None):
        self.seen, self.frozen = seen, measure == "freezing"
        self.clock = Clock(training=measure in ("training", "freezing"))

    def __bool__(self) -> bool:
        return self.seen is not None

    def dense(self, layer: Layer) -> float:
        assert self.seen is not None
        s = self.seen[layer.name]
        return s.calls * self.clock((shape_key(layer), None), layer.module, s)

    def at(self, layer: Layer, rank: Rank) -> float:
        assert self.seen is not None
        s = self.seen[layer.name]
        factors = layer.empty(rank)
        if self.frozen:
            freeze(factors)
        return s.calls * self.clock((shape_key(layer), rank), factors, s)


def _usable(layer: Layer, rank: Rank) -> str:
    if not _positive(rank):
        return "no rank is left at this size"
    if layer.parameters_at(rank) >= layer.parameters:
        return "factors would not be smaller"
    return ""


def pays(ms: float, dense: float) -> bool:
    """Whether what costs accuracy is faster, by more than timings scatter."""
    return ms * SLACK < dense


def fastest_near(
    rank: Rank, multiple: int, ms: Callable[[Any], float], size: Callable[[Any], int]
) -> tuple[Rank, float]:
    """The greatest of the candidates from ``rank`` down whose parameters (``size``) a millisecond are within SLACK of the most.

    Where time falls with the rank, and no faster, that is ``rank`` itself; below a step in time it is the rank under the step.
    """
    candidates = {snap(rank, multiple): None}
    for step in range(1, 4):
        candidates[snap(_scaled(rank, 1 - step * (1 - WINDOW) / 3), multiple)] = None
    times = {r: ms(r) for r in candidates if _positive(r)}
    rate = {r: size(r) / t for r, t in times.items()}
    most = max(rate.values())
    return next((r, t) for r, t in times.items() if rate[r] * SLACK >= most)


def by_size(layer: Layer, rank: Rank, multiple: int, timer: Timer) -> Choice:
    """The rank that a ratio or an error asks for, moved to a faster one nearby where layers are timed."""
    rank = snap(rank, multiple)
    if reason := _usable(layer, rank):
        return Choice(layer, None, reason)
    if not timer:
        return Choice(layer, rank)
    if timer.seen is not None and layer.name not in timer.seen:
        return Choice(layer, None, "no batch reached it")
    dense = timer.dense(layer)
    best, ms = fastest_near(rank, multiple, lambda r: timer.at(layer, r), layer.parameters_at)
    if not pays(ms, dense):
        return Choice(layer, None, f"factors are not {SLACK - 1:.0%} faster", dense, dense)
    return Choice(layer, best, "", dense, ms)


def by_ratio(layers: Iterable[Layer], ratio: float, multiple: int | None, timer: Timer) -> list[Choice]:
    """The rank at which each layer has ``ratio`` times fewer parameters, or a faster one near it where layers are timed."""
    return [by_size(x, x.rank_at(ratio), multiple or default_multiple(x), timer) for x in layers]


def by_error(
    layers: Iterable[Layer], error: float, moments: Mapping[str, Tensor | None], multiple: int | None, timer: Timer
) -> list[Choice]:
    """The smallest rank with at most this relative error, up to a multiple; where layers are timed, dense if that is faster."""
    choices = []
    for layer in layers:
        factors = layer.factors(moments.get(layer.name))
        step = multiple or default_multiple(layer)
        wanted: Rank = factors.rank_for(error) if isinstance(factors, MatrixFactors) else factors.ranks_for(error)
        rank = _up(wanted, layer.most, step)
        reason = _usable(layer, rank)
        if not reason and timer:
            if timer.seen is not None and layer.name not in timer.seen:
                reason = "no batch reached it"
            else:
                dense, ms = timer.dense(layer), timer.at(layer, rank)
                choices.append(
                    Choice(layer, rank, "", dense, ms)
                    if pays(ms, dense)
                    else Choice(layer, None, f"factors are not {SLACK - 1:.0%} faster", dense, dense)
                )
                continue
        choices.append(Choice(layer, None, reason) if reason else Choice(layer, rank))
    return choices


def _up(rank: Rank, most: Rank, multiple: int) -> Rank:
    if isinstance(rank, tuple):
        assert isinstance(most, tuple)
        return int(_up(rank[0], most[0], multiple)), int(_up(rank[1], most[1], multiple))  # type: ignore[arg-type]
    assert isinstance(most, int)
    while multiple > 1 and rank < 2 * multiple:
        multiple //= 2
    return min(-(-rank // multiple) * multiple, most)


def by_time(
    layers: Iterable[Layer], time: float, moments: Mapping[str, Tensor | None], multiple: int | None, timer: Timer
) -> list[Choice]:
    """Least Σ error² with at most ``time`` times the dense layers' milliseconds.

    Each layer has a few candidates (time, error²); a price per millisecond λ makes the layers' choices independent, and a
    bisection finds the smallest λ that meets the budget.
    """
    walked: list[Layer] = []
    options: list[list[tuple[Rank | None, float, float]]] = []
    for layer in layers:
        walked.append(layer)
        assert timer.seen is not None
        if layer.name not in timer.seen:
            options.append([(None, 0.0, 0.0)])
            continue
        dense = timer.dense(layer)
        mine: list[tuple[Rank | None, float, float]] = [(None, dense, 0.0)]
        m = moments.get(layer.name)
        factors = layer.factors(m)
        for rank in {snap(layer.rank_at(a), multiple or default_multiple(layer)): None for a in RATIOS}:
            if _usable(layer, rank):
                continue
            ms = timer.at(layer, rank)
            # A smaller rank that is no faster serves nobody.
            if pays(ms, dense) and ms < min(t for _, t, _ in mine):
                mine.append((rank, ms, _error(layer, factors, rank, m) ** 2))
        options.append(mine)
    total = sum(o[0][1] for o in options)
    budget = time * total

    def pick(price: float) -> list[int]:
        return [min(range(len(o)), key=lambda i: (o[i][2] + price * o[i][1], o[i][1])) for o in options]

    def cost(picks: list[int]) -> float:
        return sum(o[i][1] for o, i in zip(options, picks, strict=True))

    fastest = sum(min(t for _, t, _ in o) for o in options)
    if fastest > budget:
        raise ValueError(
            f"effcore.decompose: time {time} cannot be reached: the fastest ranks take "
            f"{fastest / max(total, 1e-12):.2f} of the dense layers' {total:.3g} ms here"
        )
    low, high = 0.0, 1.0
    while cost(pick(high)) > budget:
        high *= 4
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(pick(middle)) <= budget else (middle, high)
    choices = []
    for layer, mine, i in zip(walked, options, pick(high), strict=True):
        picked, ms, _ = mine[i]
        reason = (
            "no batch reached it" if mine[0][1] == 0 else f"factors are not {SLACK - 1:.0%} faster, or their error dear"
        )
        choices.append(Choice(layer, picked, reason if picked is None else "", mine[0][1], ms))
    return choices


def _error(layer: Layer, factors: MatrixFactors | KernelFactors, rank: Rank, moments: Tensor | None) -> float:
    if isinstance(factors, MatrixFactors):
        assert isinstance(rank, int)
        return factors.error(rank)
    return relative_error(layer.weight, layer.build(rank, factors).weight, moments)
