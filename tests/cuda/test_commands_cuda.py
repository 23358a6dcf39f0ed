"""The command line on a GPU: training in bfloat16 with compiled pieces, generation, and FSDP2 in torchrun with --resume.

Only torchrun's commands are processes of their own: importing torch and transformers anew takes a bare machine longer than
what these commands do.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from effcore.cli import main
from tests.support import free_port
from tests.training.tiny import TINY, text

__all__ = ["text"]

pytestmark = pytest.mark.cuda

SETTINGS = [*TINY, "hidden_size=128", "precision=bfloat16"]
PROCESSES = max(1, min(2, torch.cuda.device_count()))


@pytest.fixture
def effcore(capsys, monkeypatch, tmp_path):
    """Runs a command in an empty folder; gives its standard output."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        output = capsys.readouterr()
        assert ended.value.code == 0, output.err
        return output.out

    return call


def torchrun(*arguments, folder):
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        PROCESSES,
        "--master-port",
        free_port(),
        "-m",
        "effcore",
    ]
    command = [sys.executable, *map(str, launch), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def overrides(*more):
    return [part for setting in [*SETTINGS, *more] for part in ("--set", setting)]


@pytest.mark.parametrize("method", ["baseline", "epas", "echo"])
def test_train_and_generate(method, text, tmp_path, effcore):
    out = tmp_path / "run"
    options = overrides("compile=true") if method == "epas" else overrides()
    output = effcore("train", method, "--data", text, *options, "--out", out, "--json", "-q")
    summary = json.loads(output.splitlines()[-1])
    assert summary["steps"] == 12 and summary["validation_loss"] < 6
    assert effcore("generate", out, "--prompt", "def ", "-n", "8")


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


@pytest.mark.parametrize("method", ["epas", "echo"])
def test_sharded_training_resumes(method, text, tmp_path, effcore):
    """FSDP2 through Accelerate: the losses of the unsharded run, before and after an interruption."""
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    train = ["train", method, "--data", text, "-q"]
    effcore(*train, *overrides(), "--out", plain)
    split = overrides("sharded=true", f"batch_size={2 // PROCESSES}")  # the rows of a step are those of the plain run
    torchrun(*train, *split, "--out", sharded, folder=tmp_path)
    whole = losses(sharded)
    # FSDP casts parameters to bfloat16, autocast each product's operands.
    assert whole == pytest.approx(losses(plain), rel=5e-2)

    for name in ("summary.json", "model", "checkpoint-12"):
        path = sharded / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    torchrun("train", method, "--resume", "--out", sharded, "-q", folder=tmp_path)
    assert losses(sharded) == pytest.approx(whole, rel=1e-3)
    assert effcore("generate", sharded, "--prompt", "def ", "-n", "8")


def test_compress(text, tmp_path, effcore):
    """Layers timed and factored on the GPU; the result loads without the model that it was made of."""
    from effcore.methods.low_rank_checkpoint import load_decomposed

    effcore("train", "baseline", "--data", text, *overrides(), "--out", tmp_path / "run", "-q")
    made = ["compress", tmp_path / "run", "--text", text, "--length", "64", "-o", tmp_path / "small", "--json"]
    report = json.loads(effcore(*made, "--ratio", "2"))
    timed = [x for x in report["layers"] if x["ms_before"] is not None]
    assert timed and all(x["ms_after"] <= x["ms_before"] for x in timed)
    shutil.rmtree(tmp_path / "run")
    small = load_decomposed(tmp_path / "small")
    assert torch.isfinite(small(torch.tensor([[1, 2, 3]])).logits).all()
    assert sum(p.numel() for p in small.parameters()) == report["parameters_after"]


def test_doctor_shows_the_librarys_answers(effcore):
    from effcore import _cuda

    rows = json.loads(effcore("doctor", "--json"))["ops"]
    for family in ("attention", "conv3d", "kronecker", "lowrank", "routing", "scan"):
        for dtype in ("bfloat16", "float16", "float32"):
            shown = {row["path"] for row in rows if row["family"] == family and dtype in row["dtypes"].split(", ")}
            assert _cuda.path(family, dtype).partition(": ")[0] in shown
    with pytest.raises(ValueError, match="no family is called"):
        _cuda.path("transformers", "float32")
