"""The runner from the command line to the files, on a toy family; and the attention family's own parts."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import sys
import types

import pytest
import torch

import effcore.reference.attention as reference
from benchmarks import gate, report, run
from benchmarks.case import CallCost, Floor, Settings
from benchmarks.ceilings import Ceilings, measure
from benchmarks.gate import Verdict
from benchmarks.ops import _attention, _cuda_peers, bench_attention
from benchmarks.report import CallRow, Row
from benchmarks.timing import Timings, quartiles
from tests.benchmarks import toy


def row(ours: float, floor: Floor | None = None, quiet: bool = True, **peers: float) -> Row:
    return Row(toy.case(floor=floor), Verdict(True), Timings([{"effcore": ours} | peers] * 5, quiet), tuple(peers))


def test_floors_look_at_the_peers_that_they_name():
    r = row(1.0, Floor(1.2, "sdpa"), sdpa_flash=1.5, sdpa_math=4.0, flex=1.1)
    assert r.best_peer() == "flex" and r.ratio_to("flex").median == pytest.approx(1.1)
    assert r.floor_ratio() == pytest.approx(1.5) and r.met() is True
    assert row(1.0, Floor(1.6, "sdpa"), sdpa=1.5).met() is False
    assert row(1.0, Floor(1.6, "sdpa"), flex=9.0).met() is None
    assert row(1.0, sdpa=1.5).met() is None


def test_table_says_what_was_reached():
    limits = Ceilings({"float32": 1e12}, 1e9)
    bytes_moved = toy.case().work.bytes
    text = report.table([row(2 * bytes_moved / 1e9, Floor(1.2), torch=1.0)], limits)
    header, _, line = text.splitlines()
    assert header.split()[:3] == ["case", "ours", "ms"]
    assert "50%" in line and "0.5 GB/s" in line and "1.2 met" in line


def test_notes_of_the_planner_stand_below_the_table():
    limits = Ceilings({"float32": 1e12}, 1e9)
    plain = row(1.0, torch=1.0)
    noted = dataclasses.replace(plain, case=dataclasses.replace(plain.case, note="keep='lse': no layer consumes"))
    assert "planner" not in report.table([plain], limits)
    assert report.table([plain, noted], limits).endswith("double: keep='lse': no layer consumes")
    assert [c.get("note") for c in report.as_json({}, limits, [plain, noted], [])["cases"]] == [None, noted.case.note]


def test_disturbed_rows_are_marked():
    limits = Ceilings({"float32": 1e12}, 1e9)
    assert "not to be quoted" not in report.table([row(1.0, torch=1.0)], limits)
    text = report.table([row(1.0, torch=1.0), row(1.0, quiet=False, torch=1.0)], limits)
    assert text.count("1000.0~") == 1 and "not to be quoted" in text
    assert [c["quiet"] for c in report.as_json({}, limits, [row(1.0), row(1.0, quiet=False)], [])["cases"]] == [
        True,
        False,
    ]


def test_calls_are_held_against_their_limit():
    times = {"ours": quartiles([12.0]), "below": quartiles([3.0])}
    inside = CallRow(CallCost("op", print, print, limit=9.5), times)
    assert inside.above == pytest.approx(9.0) and inside.met() is True
    assert CallRow(CallCost("op", print, print, limit=8.0), times).met() is False
    assert CallRow(CallCost("op", print, print), times).met() is None


@pytest.fixture
def toy_family(monkeypatch):
    monkeypatch.setattr(run, "families", lambda: ["toy"])
    monkeypatch.setitem(sys.modules, "benchmarks.ops.bench_toy", toy)
    monkeypatch.setattr(run.ceilings, "measure", lambda *_: Ceilings({"float32": 1e12}, 1e10))


def test_from_the_command_line_to_the_files(toy_family, tmp_path, capsys):
    files = tmp_path / "a" / "toy.json", tmp_path / "b" / "toy.png"
    assert run.main(["toy", "--seconds", "0.01", "--json", str(files[0]), "--plot", str(files[1])]) == 0
    text = capsys.readouterr().out
    assert "double" in text and "add" in text
    results = json.loads(files[0].read_text())
    assert results["machine"]["threads"] == torch.get_num_threads() and results["machine"]["torch"] == torch.__version__
    (case,) = results["cases"]
    assert case["ratios"]["torch"]["median"] > 0 and case["gate"]["green"] and case["best_peer"] == "torch"
    assert results["calls"][0]["met"] is True
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_only_runs_what_matches(toy_family, capsys):
    assert run.main(["toy", "--only", "add"]) == 0
    text = capsys.readouterr().out
    assert "add" in text and "double" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["abacus"], "invalid choice"),
        (["toy", "--threads", "0"], "--threads must be positive"),
        (["toy", "--device", "tpu"], "--device must be cpu or cuda"),
        (["toy", "--only", "("], "--only (: no regular expression"),
        (["toy", "--only", "nothing"], "--only nothing: toy has no case of such a name"),
        (["toy", "--json", "."], ".: is a folder"),
        (["toy", "--plot", f"{__file__}/inside/toy.png"], "Not a directory"),
    ],
)
def test_bad_options_are_refused(toy_family, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_missing_gpu_is_said(toy_family, capsys):
    with pytest.raises(SystemExit):
        run.main(["toy", "--device", "cuda"])
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_folder_names():
    assert run.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_attention_is_a_family():
    assert "attention" in run.families()
    cases = list(bench_attention.cases(Settings()))
    assert len({c.name for c in cases}) == len(cases)
    assert all(c.note.startswith("keep='") and len(c.note) > 20 for c in cases if c.name.startswith("QK group"))


def test_peers_that_fail_or_are_wrong_are_left_out(capsys):
    def right(q, k, v):
        return reference.attention(q, k, v, causal=True)

    def token_major(q, k, v):
        return right(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    def fails(q, k, v):
        raise ValueError("not on this GPU")

    peers = [
        _cuda_peers.Peer("right", right),
        _cuda_peers.Peer("other order", token_major, token_major=True),
        _cuda_peers.Peer("not causal", reference.attention),
        _cuda_peers.Peer("fails", fails),
    ]
    inputs = [torch.randn(2, 3, 9, 4) for _ in range(4)]
    assert list(_cuda_peers.working({p.name: p for p in peers}, right, *inputs)) == ["right", "other order"]
    said = capsys.readouterr().err
    assert "not causal: wrong result" in said and "fails: ValueError: not on this GPU" in said


def test_ceilings_take_the_better():
    a, b = Ceilings({"x": 1.0, "y": 5.0}, 3.0), Ceilings({"x": 2.0, "y": 4.0}, 2.0)
    assert a.or_better(b) == Ceilings({"x": 2.0, "y": 5.0}, 3.0)


def test_ceilings_are_sane():
    limits = measure("cpu", (torch.float32,), rounds=1)
    assert 1e8 < limits.matmul["float32"] < 1e14 and 1e8 < limits.copy < 1e13


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_exact_attention_is_the_references(kv_heads, causal):
    q = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, kv_heads, 9, 8, dtype=torch.float64, requires_grad=True)
    values = [torch.randn(2, kv_heads, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    douts = [torch.randn(2, 4, 9, 8, dtype=torch.float64) for _ in range(2)]
    outs = [reference.attention(q, k, v, causal=causal) for v in values]
    gradients = torch.autograd.grad(outs, (q, k, *values), douts)
    got_outs, got_gradients = _attention.exact_attention(q, k, values, douts, causal=causal)
    for got, expected in zip(got_outs + got_gradients, [*outs, *gradients], strict=True):
        torch.testing.assert_close(got, expected)


SMALL = Settings(compiled=False), (1, 2, 40, 16), torch.float32
SMALL_CACHE = Settings(compiled=False), (2, 4, 2, 300, 16), torch.float32


@pytest.mark.parametrize(
    "make",
    [
        lambda: bench_attention._layer(*SMALL),
        lambda: bench_attention._layer(*SMALL, backward=True),
        lambda: bench_attention._qk_group(*SMALL, "lse"),
        lambda: bench_attention._qk_group(*SMALL, "probs"),
        lambda: bench_attention._kv_group(*SMALL),
        lambda: bench_attention._decode(*SMALL_CACHE),
        lambda: bench_attention._decode_from_probs(*SMALL_CACHE),
    ],
)
def test_attention_cases_pass_their_gates(make):
    case = make()
    verdict, peers, _ = gate.judge(case, case.inputs())
    assert verdict.green, verdict.reason
    assert peers[0].name == "sdpa flash"


def test_runs_are_reported_as_they_go(toy_family):
    log = io.StringIO()
    run.run(toy, Settings(), seconds=0.01, log=log)
    assert log.getvalue() == "[1/1] double\n"


def test_ctrl_c_reports_what_there_is():
    def interrupt(x):
        raise KeyboardInterrupt

    family = types.SimpleNamespace(DTYPES=toy.DTYPES, cases=lambda _: [toy.case(), toy.case(interrupt, name="second")])
    log = io.StringIO()
    results, text, green = run.run(family, Settings(), seconds=0.01, log=log)
    assert green and [c["name"] for c in results["cases"]] == ["double"] and "double" in text
    assert log.getvalue().endswith("interrupted: what was measured so far\n")


@pytest.mark.parametrize("claim", ["conv3d", "low_rank", "skipvit", "swiftlearn", "ttc", "vds_ttt"])
def test_an_installed_package_comes_before_the_sources_which_have_no_libraries(claim, monkeypatch):
    module = importlib.import_module(f"benchmarks.claims.{claim}")
    sources = str(module.ROOT / "python")
    monkeypatch.setattr(sys, "path", [*(path for path in sys.path if path != sources), "installed"])
    importlib.reload(module)
    assert sys.path.index("installed") < sys.path.index(sources)
