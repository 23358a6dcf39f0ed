"""The clockwork, on clocks that tell known times."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import timing
from benchmarks.case import Candidate
from benchmarks.timing import interleave, quartiles, ratio
from tests.benchmarks.toy import ScriptedClock


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 100])
def test_quartiles_are_numpys(count):
    values = np.random.default_rng(count).random(count).tolist()
    got = quartiles(values)
    assert (got.q1, got.median, got.q3) == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]))
    assert got.count == count


def test_no_values_have_no_quartiles():
    with pytest.raises(ValueError, match="no values"):
        quartiles([])


def run(cost, names=("ours", "peer"), sets=3, **options):
    clock = ScriptedClock(cost)
    inputs = [{"x": torch.zeros(1)} for _ in range(sets)]
    options = {"seconds": 1e9, "most": 10} | options
    times = interleave({n: clock.candidate(n) for n in names}, inputs, clock, now=lambda: clock.total, **options)
    return times, clock


def test_ratio_is_peer_over_ours():
    times, _ = run(lambda name, _: {"ours": 2.0, "peer": 3.0}[name])
    assert ratio(times["ours"], times["peer"]).median == pytest.approx(1.5)


def test_a_machine_that_slows_down_does_not_change_the_ratio():
    """Ten times slower from the middle on: the median of the times moves, that of the rounds' ratios does not."""
    times, _ = run(lambda name, n: {"ours": 1.0, "peer": 1.3}[name] * (10 if n > 7 else 1) * (1 + 0.01 * n))
    r = ratio(times["ours"], times["peer"])
    assert (r.q1, r.median, r.q3) == pytest.approx((1.3, 1.3, 1.3))
    assert quartiles(times["ours"]).spread > 1


def test_candidates_alternate_and_the_order_turns():
    _, clock = run(lambda *_: 1.0, most=4, warm_up=0)
    assert clock.order == ["ours", "peer", "peer", "ours", "ours", "peer", "peer", "ours"]


def test_warm_up_is_not_timed():
    times, _ = run(lambda name, n: 100.0 if n <= 2 else 1.0, most=5)
    assert times["ours"] == [1.0] * 5


def test_budget_ends_the_rounds():
    times, _ = run(lambda *_: 1.0, seconds=20.0, least=3, most=1000)
    assert len(times["ours"]) == 10  # two seconds a round
    times, _ = run(lambda *_: 1.0, seconds=0.0, least=3, most=1000)
    assert len(times["ours"]) == 3


def test_hopeless_candidates_are_dropped_but_stay_in_the_table():
    cost = {"ours": 1.0, "peer": 2.9, "slow": 3.1}
    times, _ = run(lambda name, _: cost[name], names=tuple(cost), trial=2)
    assert (len(times["ours"]), len(times["peer"]), len(times["slow"])) == (10, 10, 2)
    assert ratio(times["ours"], times["slow"]).median == pytest.approx(3.1)


def test_we_are_not_dropped_for_being_slow_once():
    times, _ = run(lambda name, n: 50.0 if name == "ours" and n == 3 else 1.0)
    assert len(times["ours"]) == 10


def test_input_sets_go_round():
    seen: list[int] = []
    interleave(
        {n: Candidate(n, lambda x: seen.append(int(x["x"])) or []) for n in "ab"},
        [{"x": torch.tensor(i)} for i in range(3)],
        lambda call: call() or 1.0,
        seconds=1e9,
        most=3,
        warm_up=0,
    )
    assert seen == [0, 1, 2, 0, 1, 2]  # no candidate finds its inputs in the cache that the one before it filled


def test_input_sets_fill_the_cache_twice(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda _: 10_000)
    inputs = {"x": torch.randn(10, 100).T.requires_grad_(), "y": torch.randn(5)}
    sets = timing.input_sets(inputs, "cpu")
    assert len(sets) == 5  # 4020 bytes each
    assert len({s["x"].data_ptr() for s in sets}) == 5
    for s in sets:
        assert torch.equal(s["x"], inputs["x"]) and s["x"].stride() == inputs["x"].stride()
        assert s["x"].requires_grad and s["x"].is_leaf and not s["y"].requires_grad
    assert len(timing.input_sets(inputs, "cpu", most_bytes=1)) == 2


def test_cpu_clock_measures():
    assert 0 < timing.CpuClock()(lambda: sum(range(1000))) < 1


def test_call_costs_are_a_call():
    calls = []
    got = timing.microseconds_a_call({"a": lambda: calls.append(0)}, rounds=3, repeats=10)
    assert len(calls) == 40 and got["a"].count == 3 and 0 < got["a"].median < 1e4


def test_cache_size_is_found():
    assert timing.cache_bytes("cpu") >= 1 << 20
