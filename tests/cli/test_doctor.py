"""``effcore doctor``: what it finds here, and that a GPU's paths are the library's own answers."""

from __future__ import annotations

import contextlib
import json
import sys
import types

import pytest

import effcore
from effcore.cli import main
from effcore.cli.doctor import _WITH_PRODUCTS, _WITHOUT_PRODUCTS, _cuda_rows


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        return ended.value.code, capsys.readouterr().out

    return call


def test_doctor(run):
    code, out = run("doctor", "--json")
    findings = json.loads(out)
    assert code == 0 and findings["problems"] == []
    assert {row["device"] for row in findings["ops"]} == {"cpu", "cuda"}
    assert all(row["path"] and row["reason"] for row in findings["ops"])
    assert findings["packages"]["torch"]
    code, out = run("doctor")
    assert code == 0
    for row in findings["ops"]:
        assert all(word in out for word in row["family"].replace(",", " ").split())


@pytest.mark.parametrize(
    "isa, paths", [("v3", {"avx2"}), ("bf16", {"avx512", "avx512_bf16"}), ("amx", {"avx512", "amx tiles"})]
)
def test_doctor_names_the_families_with_products_of_bfloat16(run, monkeypatch, isa, paths):
    monkeypatch.setattr("effcore.cli.doctor._build", lambda problems: {"isa": isa})
    code, out = run("doctor", "--json")
    rows = [row for row in json.loads(out)["ops"] if row["device"] == "cpu" and row["family"] != "QK group"]
    families = {"all", _WITH_PRODUCTS, _WITHOUT_PRODUCTS} if len(paths) > 1 else {"all"}
    assert code == 0 and {row["family"] for row in rows} == families and {row["path"] for row in rows} == paths
    code, out = run("doctor")
    assert code == 0 and all(word in out for word in ", ".join(families).split(", "))


def test_doctor_asks_the_library_for_each_family(monkeypatch):
    """A stand-in for the GPU's module: what it answers is what is shown, and nothing is derived beside it."""
    answers = {
        "attention": ("mma sm_80", "fma sm_80"),
        "conv3d": ("wgmma sm_90a", "none: built with EFFCORE_CUDA_SET=ci"),
        "kronecker": ("wgmma sm_90a", "fma sm_80"),
        "lowrank": ("wgmma sm_90a", "cublas"),
        "routing": ("sm_80", "sm_80"),
        "scan": ("none: compute capability below 8.0",) * 2,
    }
    library = types.ModuleType("effcore._cuda")
    library.path = lambda family, dtype: answers[family][dtype == "float32"]
    monkeypatch.setitem(sys.modules, "effcore._cuda", library)
    monkeypatch.setattr(effcore, "_cuda", library, raising=False)
    monkeypatch.setattr("torch.cuda.device", lambda index: contextlib.nullcontext())
    rows = _cuda_rows([{"name": "H200", "compute_capability": "9.0"}])
    shown = {(row["family"], row["dtypes"]): (row["path"], row["reason"]) for row in rows}
    assert len(shown) == len(rows) == 10
    assert shown["attention", "bfloat16, float16"] == ("mma sm_80", "H200: tensor cores")
    assert shown["conv3d", "bfloat16, float16"] == ("wgmma sm_90a", "H200: channels in multiples of 8")
    assert shown["conv3d", "float32"] == ("none", "H200: built with EFFCORE_CUDA_SET=ci")
    assert shown["kronecker", "float32"][0] == "fma sm_80"
    assert shown["lowrank", "float32"] == ("cublas", "H200: two products, then our activation")
    assert shown["routing", "bfloat16, float16, float32"] == ("sm_80", "H200: no matrix products")
    assert shown["scan", "bfloat16, float16, float32"] == ("none", "H200: compute capability below 8.0")
