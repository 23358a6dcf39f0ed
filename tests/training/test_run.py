"""Training runs end to end on a tiny model: what they leave, and that stopping and resuming changes nothing."""

from __future__ import annotations

import json
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file

from effcore.errors import InputError, RunError
from effcore.training.checkpoint import checkpoints
from effcore.training.folder import RunConfig, RunFolder
from effcore.training.recipe import load_recipe
from effcore.training.run import Interrupted, train


def config(method, tiny, text, *overrides, model=None):
    return RunConfig(method, load_recipe("fresh", [*tiny, *overrides], method=method), model=model, data=str(text))


def losses(folder):
    return [(row["kind"], row["step"], row["loss"], row["layout"]) for row in RunFolder(folder).metrics()]


def stop_at(step):
    """A listener that presses Ctrl-C when the row of ``step`` is written."""

    def listener(row):
        if row["step"] == step and row["kind"] == "train":
            os.kill(os.getpid(), signal.SIGINT)

    return listener


CASES = {
    "baseline": ("baseline", []),
    "epas-qk": ("epas", ["mode=qk"]),
    "epas-kv": ("epas", ["mode=kv", "accumulation=2"]),
    "echo": ("echo", []),
}


@pytest.mark.parametrize("case", CASES)
def test_interrupted_and_resumed_equals_uninterrupted_bitwise(case, tiny, text, tmp_path):
    method, overrides = CASES[case]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    summary = train(config(method, tiny, text, *overrides), whole)
    handler = signal.getsignal(signal.SIGINT)  # not Python's own where the tests run in the background
    with pytest.raises(Interrupted) as stopped:
        train(config(method, tiny, text, *overrides), parts, listener=stop_at(4))
    assert stopped.value.step == 5  # the signal arrives while step 4 is written down, and step 5 ends well
    assert RunFolder(parts).summary() is None
    assert signal.getsignal(signal.SIGINT) is handler
    again = train(RunConfig(method, load_recipe("fresh")), parts, resume=True)
    assert losses(parts) == losses(whole)
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for key in ("validation_loss", "tokens", "layout", "cache_bytes_per_token"):
        assert again[key] == summary[key]


def test_run_folder(tiny, text, tmp_path):
    base, out = tmp_path / "base", tmp_path / "epas"
    train(config("baseline", tiny, text), base)
    summary = train(config("epas", tiny, text), out, against=base)
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "report.md",
        "plots",
        "model",
        "checkpoint-8",
        "checkpoint-12",
    }
    assert {path.name for path in (out / "plots").iterdir()} == {"loss.png", "speed.png", "cache.png", "overview.png"}
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert summary == json.loads((out / "summary.json").read_text())
    assert (summary["layout"], summary["mode"], summary["shared_layers"]) == ("0_1_1_1", "qk", 2)
    assert summary["tokens"] == 12 * 2 * 32
    # 4 layers, one kv head of 16, float32: K and V in each, and the two consumers without K
    assert [RunFolder(folder).summary()["cache_bytes_per_token"] for folder in (base, out)] == [8 * 16 * 4, 6 * 16 * 4]
    assert [row["layout"] for row in RunFolder(out).metrics() if row["kind"] == "train"][1:5] == [
        "0_1_2_3",
        "0_1_2_2",
        "0_1_2_2",
        "0_1_1_1",
    ]
    report = (out / "report.md").read_text()
    assert "| baseline |" in report and "epas qk, 2 of 4 layers share" in report
    # The same first step: sharing begins later, and both begin with the same weights on the same text.
    assert losses(base)[0][2] == pytest.approx(losses(out)[0][2], abs=1e-5)


def test_checkpoints_continue_as_models(tiny, text, tmp_path):
    train(config("epas", tiny, text), tmp_path / "epas")
    summary = train(config("baseline", tiny, text, "steps=2", model=str(tmp_path / "epas")), tmp_path / "more")
    assert summary["layout"] == "0_1_1_1"
    summary = train(config("echo", tiny, text, "steps=6", model=str(tmp_path / "more")), tmp_path / "echo")
    assert summary["mode"] == "kv"


def test_full_disk_keeps_the_last_good_checkpoint(tiny, text, tmp_path):
    out = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(row):
        if row["step"] == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    try:
        with pytest.raises(RunError, match=r"disk is full.*last good checkpoint is .*checkpoint-4") as caught:
            train(config("epas", tiny, text), out, listener=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-4"]
    assert not (out / ".in-progress").exists()
    train(config("epas", tiny, text), tmp_path / "whole")
    train(RunConfig("epas", load_recipe("fresh")), out, resume=True)
    assert losses(out) == losses(tmp_path / "whole")


def test_divergence_is_an_error_and_not_a_checkpoint(tiny, text, tmp_path):
    with pytest.raises(RunError, match="training diverged: the loss is nan"):
        train(
            config("baseline", tiny, text, "learning_rate=1e30", "clip_norm=1e30", "schedule=constant"),
            tmp_path / "run",
        )
    assert checkpoints(tmp_path / "run") == []


def test_documents_can_be_kept_apart(tiny, text, tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"short document {i}\n")
    settings = ["separate_documents=true", "steps=2"]
    runs = [train(config(method, tiny, folder, *settings), tmp_path / method) for method in ("baseline", "epas")]
    assert losses(tmp_path / "epas")[0][2] == pytest.approx(losses(tmp_path / "baseline")[0][2], abs=1e-5)
    assert runs[0]["tokens"] == runs[1]["tokens"]


@pytest.mark.parametrize("method", ["baseline", "epas"])
def test_bfloat16_and_gradient_checkpointing(method, tiny, text, tmp_path):
    plain = train(config(method, tiny, text, "steps=4"), tmp_path / "plain")
    checkpointed = train(
        config(method, tiny, text, "steps=4", "gradient_checkpointing=true"), tmp_path / "checkpointed"
    )
    assert checkpointed["validation_loss"] == pytest.approx(plain["validation_loss"], rel=1e-4)
    half = train(config(method, tiny, text, "steps=4", "precision=bfloat16"), tmp_path / "half")
    assert half["validation_loss"] == pytest.approx(plain["validation_loss"], rel=2e-2)
    assert half["cache_bytes_per_token"] * 2 == plain["cache_bytes_per_token"]


@pytest.mark.parametrize(
    ("method", "overrides", "words"),
    [
        ("epas", ["epas.layout=0_1_3_3"], "layer 2 points forward to layer 3"),
        ("epas", ["epas.layout=0_1"], "has 2 layers but the model has 4"),
        ("epas", ["epas.layout=hello"], "expected one owner index per layer"),
        ("epas", ["max_shared=4"], "max_shared must be from 0 to 3 with 4 layers, got 4"),
        ("echo", ["echo.start=9"], "final_start must be from 1 to 4"),
        ("baseline", ["data.length=8192", "model.max_length=64"], "the text has|positions for 64 tokens"),
        ("baseline", ["model.max_length=16"], "data.length is 32, but the model has positions for 16 tokens"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    method, overrides, words, tiny, text, tmp_path
):
    with pytest.raises(InputError, match=words) as caught:
        train(config(method, tiny, text, *overrides), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_folders_are_not_overwritten_by_accident(tiny, text, tmp_path):
    out = tmp_path / "run"
    settings = config("baseline", tiny, text, "steps=1")
    train(settings, out)
    with pytest.raises(InputError, match="--resume or replace it with --overwrite"):
        train(settings, out)
    assert train(settings, out, resume=True)["steps"] == 1  # finished: nothing to do
    assert train(settings, out, overwrite=True)["steps"] == 1
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("precious")
    with pytest.raises(InputError, match="not empty and holds no run"):
        train(settings, foreign, overwrite=True)
    assert (foreign / "chapter1.tex").exists()
    with pytest.raises(InputError, match="the run's method is baseline, not epas"):
        train(config("epas", tiny, text), out, resume=True)
    with pytest.raises(InputError, match="no run here"):
        train(settings, tmp_path / "nothing", resume=True)


def test_resuming_from_damaged_weights_or_on_changed_text_is_refused(tiny, text, tmp_path):
    with pytest.raises(Interrupted):
        train(config("baseline", tiny, text), tmp_path / "run", listener=stop_at(2))
    weights = next((tmp_path / "run").glob("checkpoint-*/model.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(InputError, match=r"checkpoint-\d+: the model's file is damaged"):
        train(RunConfig("baseline", load_recipe("fresh")), tmp_path / "run", resume=True)
    weights.write_bytes(whole)
    state = weights.with_name("trainer_state.json")
    written = state.read_text()
    state.write_text(written[:100])
    with pytest.raises(InputError, match=r"trainer_state\.json: damaged"):
        train(RunConfig("baseline", load_recipe("fresh")), tmp_path / "run", resume=True)
    state.write_text(written)
    text.write_text(text.read_text() + "more\n")
    with pytest.raises(InputError, match="has changed since the run began"):
        train(RunConfig("baseline", load_recipe("fresh")), tmp_path / "run", resume=True)


def test_flowhn_refuses_separate_documents(tiny, text, tmp_path):
    with pytest.raises(InputError, match="separate_documents: a FlowHN model reads each window as one text"):
        train(config("flowhn", tiny, text, "separate_documents=true"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_distillation_is_reported_apart_from_the_loss(tiny, text, tmp_path):
    train(config("echo", tiny, text, "steps=2"), tmp_path / "with")
    train(config("echo", tiny, text, "steps=2", "distillation=0"), tmp_path / "without")
    rows = [
        [row for row in RunFolder(tmp_path / name).metrics() if row["kind"] == "train"] for name in ("with", "without")
    ]
    assert rows[0][0]["distillation"] > 0 and "distillation" not in rows[1][0]
    assert rows[0][0]["loss"] == pytest.approx(rows[1][0]["loss"], abs=1e-5)  # the first step: the same weights
