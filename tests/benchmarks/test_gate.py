"""The gate must be able to close."""

from __future__ import annotations

import io
import types

import pytest
import torch

from benchmarks import gate, report, run
from benchmarks.case import Candidate, Settings
from benchmarks.ceilings import Ceilings
from tests.benchmarks import toy


def judge(case):
    torch.manual_seed(0)
    return gate.judge(case, case.inputs())


def off_by_a_little(x):
    return [x["x"] * 2.00001]


def one_element_wrong(x):
    y = x["x"] * 2
    y[3, 5] += 1e-2
    return [y]


def one_element_unwritten(x):
    y = torch.empty_like(x["x"])
    y.view(-1)[:-1] = x["x"].reshape(-1)[:-1] * 2
    return [y]


def nan(x):
    return [x["x"] * 2 + torch.where(x["x"] == x["x"].max(), float("nan"), 0.0)]


def infinite(x):
    return [x["x"] / 0]


def transposed(x):
    return [x["x"].reshape(32, 128) * 2]


def too_many(x):
    return [x["x"] * 2, x["x"]]


def raises(x):
    raise RuntimeError("no kernel")


WRONG = [off_by_a_little, one_element_wrong, one_element_unwritten, nan, infinite, transposed, too_many, raises]


def test_a_right_result_passes():
    verdict, peers, absent = judge(toy.case())
    assert verdict.green and not verdict.reason and len(peers) == 1 and not absent
    assert verdict.errors == {"y": (0.0, 0.0)}


@pytest.mark.parametrize("ours", WRONG)
def test_a_wrong_kernel_is_red(ours):
    verdict, _, _ = judge(toy.case(ours))
    assert not verdict.green and verdict.reason


@pytest.mark.parametrize("ours", WRONG)
def test_a_red_gate_prints_no_time(ours):
    row = run.measure(toy.case(ours), Settings(), lambda call: pytest.fail("a wrong kernel was timed"), seconds=1.0)
    limits = Ceilings({"float32": 1e9}, 1e9)
    text = report.table([row], limits)
    assert "WRONG" in text and row.verdict.reason in text and "GB/s" not in text
    (entry,) = report.as_json({}, limits, [row], [])["cases"]
    assert entry["gate"]["green"] is False and "seconds" not in entry and "ratios" not in entry


def test_a_wrong_kernel_fails_the_run():
    family = types.SimpleNamespace(DTYPES=toy.DTYPES, cases=lambda _: [toy.case(off_by_a_little)])
    results, text, green = run.run(family, Settings(), seconds=0.01, log=io.StringIO())
    assert not green and "y is off by" in text and len(results["cases"]) == 1


def test_the_error_may_be_twice_that_of_the_same_dtype_computation():
    def rounded(scale):
        return lambda x: [x["x"] * 2 * (1 + scale)]

    peer = Candidate("torch", rounded(1e-3))
    assert judge(toy.case(rounded(1.9e-3), peer))[0].green
    assert not judge(toy.case(rounded(2.1e-3), peer))[0].green


def test_peers_that_do_not_work_are_left_out_and_named():
    right = Candidate("right", toy.double)
    verdict, peers, absent = judge(
        toy.case(toy.double, right, Candidate("broken", raises), Candidate("other", infinite))
    )
    assert verdict.green and peers == (right,)
    assert absent["broken"] == "RuntimeError: no kernel" and absent["other"].startswith("wrong result")


def test_without_any_peer_there_is_no_bound():
    verdict, peers, _ = judge(toy.case(toy.double, Candidate("broken", raises)))
    assert not verdict.green and not peers


def test_poison_is_lifted_again():
    before = torch.are_deterministic_algorithms_enabled()
    with gate.poisoned_memory():
        assert torch.empty(3).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before
