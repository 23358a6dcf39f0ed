"""The clockwork, on clocks that tell known times."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import timing
from benchmarks.case import Candidate
from benchmarks.quiet import Neighbours, Quiet, processor_seconds
from benchmarks.timing import Timings, interleave, quartiles
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
    options = {"seconds": 1e9, "most": 10, "window": 0.0, "now": lambda: clock.total} | options
    return interleave({n: clock.candidate(n) for n in names}, inputs, clock, **options), clock


def test_ratio_is_peer_over_ours():
    timings, _ = run(lambda name, _: {"ours": 2.0, "peer": 3.0}[name])
    assert timings.ratio("ours", "peer").median == pytest.approx(1.5)
    assert timings.of("ours").median == 2.0 and timings.of("peer").median == 3.0


def test_ratio_pairs_the_runs_of_a_round():
    timings = Timings(
        [{"ours": 1.0, "peer": 2.0, "slow": 9.0}, {"ours": 10.0, "peer": 20.0}, {"ours": 4.0, "peer": 8.0}]
    )
    assert timings.ratio("ours", "peer") == quartiles([2.0, 2.0, 2.0])
    assert timings.ratio("ours", "slow") == quartiles([9.0])


def test_a_machine_that_slows_down_does_not_change_the_ratio():
    """Ten times slower from the middle on: the median of the times moves, that of the rounds' ratios does not."""
    timings, _ = run(lambda name, n: {"ours": 1.0, "peer": 1.3}[name] * (10 if n > 7 else 1) * (1 + 0.01 * n))
    r = timings.ratio("ours", "peer")
    assert (r.q1, r.median, r.q3) == pytest.approx((1.3, 1.3, 1.3))
    assert timings.of("ours").spread > 1


def test_candidates_alternate_and_the_order_turns():
    _, clock = run(lambda *_: 1.0, most=4, warm_up=0)
    assert clock.order == ["ours", "peer", "peer", "ours", "ours", "peer", "peer", "ours"]


def test_warm_up_is_not_timed():
    timings, _ = run(lambda name, n: 100.0 if n <= 2 else 1.0, most=5)
    assert timings.rounds == [{"ours": 1.0, "peer": 1.0}] * 5


def test_budget_ends_the_rounds():
    timings, _ = run(lambda *_: 1.0, seconds=20.0, least=3, most=1000)
    assert len(timings.rounds) == 10  # two seconds a round
    timings, _ = run(lambda *_: 1.0, seconds=0.0, least=3, most=1000)
    assert len(timings.rounds) == 3
    timings, _ = run(lambda *_: 1.0, window=1e9, most=7)
    assert len(timings.rounds) == 7


def test_hopeless_candidates_are_dropped_but_stay_in_the_table():
    cost = {"ours": 1.0, "peer": 2.9, "slow": 3.1}
    timings, _ = run(lambda name, _: cost[name], names=tuple(cost), trial=2)
    assert [timings.of(n).count for n in cost] == [10, 10, 2]
    assert timings.ratio("ours", "slow").median == pytest.approx(3.1)


def test_we_are_not_dropped_for_being_slow_once():
    timings, _ = run(lambda name, n: 50.0 if name == "ours" and n == 3 else 1.0)
    assert timings.of("ours").count == 10


def test_disturbed_rounds_are_thrown_away():
    answers = iter([True, True, False, False, True] + [True] * 100)  # the first begins the first window
    naps = []
    quiet, nap = lambda: next(answers), naps.append
    timings, _ = run(lambda _, n: float(n), warm_up=0, most=4, patience=100.0, quiet=quiet, sleep=nap)
    assert [r["ours"] for r in timings.rounds] == [
        1.0,
        3.0,
        4.0,
        5.0,
    ]  # the second was disturbed, and so was the nap after it
    assert timings.quiet and len(naps) == 2


def test_patience_ends():
    timings, _ = run(
        lambda *_: 1.0, warm_up=0, least=3, patience=9.0, window=1.0, quiet=lambda: False, sleep=lambda _: None
    )
    assert not timings.quiet and timings.rounds
    timings, _ = run(lambda *_: 1.0, warm_up=0, least=3, patience=0.0, quiet=lambda: False, sleep=lambda _: None)
    assert not timings.quiet and len(timings.rounds) == 1


def test_neighbours_are_what_is_not_ours():
    machine = iter([(100.0, 1000.0), (101.0, 1002.0), (101.5, 1004.0), (101.5, 1004.0)])
    own = iter([7.0, 8.0, 8.0, 8.0])
    neighbours = Neighbours(lambda: next(machine), lambda: next(own))
    assert [neighbours.share() for _ in range(3)] == pytest.approx([0.0, 0.25, 0.0])


def test_quiet_has_a_tolerance():
    class Share:
        def __init__(self, value):
            self.share = lambda: value

    assert Quiet(0.06, Share(0.05))() and not Quiet(0.06, Share(0.07))()


def test_processor_seconds_go_forward():
    before, after = processor_seconds(), processor_seconds()
    assert 0 < before[0] <= after[0] and before[0] < before[1] <= after[1]


def test_input_sets_go_round():
    seen: list[int] = []
    interleave(
        {n: Candidate(n, lambda x: seen.append(int(x["x"])) or []) for n in "ab"},
        [{"x": torch.tensor(i)} for i in range(3)],
        lambda call: call() or 1.0,
        seconds=1e9,
        most=3,
        warm_up=0,
        trial=4,
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
