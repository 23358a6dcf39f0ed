"""What the programs under tests/cuda rest on, where there is no GPU: they must not pass for want of a tool that looked."""

import os
import stat

import pytest
import torch

from tests.cuda.checks import Sanitizers, finish

CLEAN = "echo '========= COMPUTE-SANITIZER'; echo '========= ERROR SUMMARY: 0 errors'"
HAZARD = "echo '========= Error: Race reported'; echo '========= RACECHECK SUMMARY: 1 hazard displayed'; exit 9"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Puts a compute-sanitizer on PATH that does what a shell script says."""

    def install(script: str) -> None:
        file = tmp_path / "compute-sanitizer"
        file.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{script}\n')
        file.chmod(file.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


def test_what_compute_sanitizer_finds_nothing_in_passes(tool, tmp_path):
    tool(CLEAN)
    results = Sanitizers("check.py", "scan", [("0", "2"), ("1", "2")]).results()
    assert results == [(f"{t} {part} 2", True, "") for t in ("memcheck", "racecheck") for part in (0, 1)]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 4 and all("kernel_substring=scan" in a and "check.py --small" in a for a in asked)


@pytest.mark.parametrize(
    "script, why",
    [
        (HAZARD, "Race reported"),
        ("echo '========= COMPUTE-SANITIZER'; echo 'no such kernel'; exit 1", "no such kernel"),
        ("true", "nothing said"),  # a status of 0 from a tool that did not come to its end
        ("exec sleep 30", "within 0.2 s"),
    ],
)
def test_all_else_fails_and_says_why(tool, script, why):
    tool(script)
    (result,) = Sanitizers("check.py", "scan", tools=["racecheck"]).results(seconds=0.2 if "sleep" in script else 60)
    assert result[:2] == ("racecheck", False) and why in result[2]


def test_without_compute_sanitizer_the_check_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Sanitizers("check.py", "scan", tools=["memcheck"]).results() == [
        ("memcheck", False, "compute-sanitizer is not on PATH")
    ]


def test_the_exit_status_of_a_check(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setenv("OUT", str(tmp_path))
    right, wrong = ("first", True, ""), ("second", False, "off by one")
    assert finish("scan", [right]) == 0
    assert finish("scan", [], times=[]) == 1, "nothing was checked"
    assert finish("scan", [], times=[1.5]) == 0, "times alone were asked for"
    assert finish("scan", [right, wrong], times=[1.5]) == 1
    assert "FAILED second off by one" in capsys.readouterr().out
    assert '"second"' in (tmp_path / "scan_check.json").read_text()
