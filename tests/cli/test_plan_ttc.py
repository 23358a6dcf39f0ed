"""``effcore plan ttc results.csv``."""

import errno
import json
import math

import pytest
from typer.testing import CliRunner

from effcore.errors import InputError, RunError
from tests.methods.test_ttc import saturating


def invoke(*arguments):
    from effcore.cli.app import app

    return CliRunner().invoke(app, ["plan", "ttc", *map(str, arguments)])


def table(path, gain=0.09, names=("tokens", "1", "majority@2", "4", "8")):
    lines = [",".join(names)]
    for i in range(1, 21):
        values = [min(saturating(i / 20) + gain * math.log2(k), 1) for k in (1, 2, 4, 8)]
        lines.append(",".join([str(i * 1e6), *(f"{v:.4f}" for v in values)]))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_first_stop_and_its_picture(tmp_path):
    plot = tmp_path / "plots" / "ttc.png"
    result = invoke(table(tmp_path / "r.csv"), "--items", 2000, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert "of the training FLOPs saved" in result.output and plot.stat().st_size > 10_000
    rows = json.loads(invoke(table(tmp_path / "r.csv"), "--items", 2000, "--json").output)
    assert rows[-1]["stop"] and rows[-1]["tokens"] < 1e7 and not any(row["stop"] for row in rows[:-1])
    measured = rows[-1]["samples"] in (1, 2, 4, 8)
    assert (rows[-1]["measured"] is not None) == measured == ("is a projection" not in result.output)
    result = invoke(table(tmp_path / "r.csv"), "--items", 2000, "--lifetime", 1e12)
    assert "No checkpoint could have been the last" in result.output


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "expected the columns tokens, 1, 2, 4, 8"),
        ("tokens,2\n1,0.5\n", "expected the columns"),
        ("tokens,1,pass@1\n1,0.5,0.5\n", "several columns for the same"),
        ("tokens,1,2\n1,0.5,x\n", "line 2: not a number"),
        ("tokens,1,2\n1,0.5,3\n", "the accuracy at 2 samples must be from 0 to 1, got 3.0"),
        ("tokens,1,2\n1,0.5,0.6\n1,0.5,0.6\n", "checkpoints must come in order"),
        ("tokens,1,2\n1,,0.6\n2,1,1\n", "the accuracy at 1 sample is needed"),
    ],
)
def test_bad_tables(content, message, tmp_path):
    path = tmp_path / "r.csv"
    path.write_text(content)
    result = invoke(path)
    assert isinstance(result.exception, InputError) and message in str(result.exception)


@pytest.mark.filterwarnings("error")
def test_a_picture_without_a_bound_and_one_that_cannot_be_written(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "r.csv"
    path.write_text("tokens,1,2,4\n" + "".join(f"{i},0.5,0.5,0.5\n" for i in range(1, 7)))
    result = invoke(path, "--plot", tmp_path / "p.png")
    assert result.exit_code == 0 and (tmp_path / "p.png").is_file(), result.output
    result = invoke(path, "--plot", tmp_path / "p.xyz")
    assert isinstance(result.exception, RunError) and "p.xyz: cannot be written" in str(result.exception)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    result = invoke(path, "--plot", tmp_path / "q.png")
    assert isinstance(result.exception, RunError) and "q.png: cannot be written (No space" in str(result.exception)
    assert "No checkpoint could have been the last" in result.output  # the decisions are not lost


def test_bad_settings_and_few_points(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("tokens,1,2,4\n1,0.1,0.2,0.3\n2,0.2,0.3,0.4\n3,0.25,0.4,0.5\n")
    result = invoke(path, "--budget", 100, "--plot", tmp_path / "p.png")
    assert result.exit_code == 0 and "3 checkpoints, and a projection needs 4" in result.output
    assert isinstance(invoke(path, "--most-samples", 1).exception, InputError)
    assert isinstance(invoke(tmp_path / "nowhere.csv").exception, InputError)
