"""``effcore train flowhn`` and ``effcore plan flowhn``."""

import json

import pytest
from typer.testing import CliRunner

from effcore.cli.app import app
from effcore.errors import InputError
from effcore.training.models import load_model

runner = CliRunner()
TINY = ["layers=2", "hidden_size=32", "heads=2", "kv_heads=2", "mlp_size=48", "length=32", "steps=6", "batch_size=2"]
TINY += ["log_every=2", "validate_every=3", "checkpoint_every=3", "validation_windows=2", "state_size=4"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return path


def train(text, out, *more):
    settings = [x for s in TINY for x in ("--set", s)]
    return ["train", "flowhn", "--data", str(text), "--out", str(out), "-q", *settings, *more]


@pytest.mark.parametrize("strategy", ["fac", "none", "sequential"])
def test_train(tmp_path, text, strategy):
    out = tmp_path / "run"
    result = runner.invoke(app, [*train(text, out, "--json"), "--set", f"strategy={strategy}"])
    assert result.exit_code == 0, (result.output, result.exception)
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["title"] == f"flowhn {strategy}" and summary["steps"] == 6
    model, tokenizer = load_model(out)
    assert model.config.strategy == strategy
    prompt = tokenizer("the quick", return_tensors="pt").input_ids
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape[1] == prompt.shape[1] + 4
    assert (out / "report.md").read_text().startswith(f"# flowhn {strategy}")


def test_bad_settings_are_named(tmp_path, text):
    for setting, message in (
        ("strategy=halves", "flowhn.strategy must be"),
        ("attention_tokens=99", "flowhn: attention_tokens must be from 0 to"),
        ("routing_length=0", "flowhn: routing_length must be positive"),
    ):
        result = runner.invoke(app, [*train(text, tmp_path / "run"), "--set", setting])
        assert isinstance(result.exception, InputError) and message in str(result.exception)


def test_plan():
    result = runner.invoke(app, ["plan", "flowhn", "--size", "350M", "--json"])
    plan = json.loads(result.stdout)
    assert plan["attention_tokens"] + plan["ssm_tokens"] == 1024
    assert abs(plan["balance"] - 1) < 0.05
    assert 1.6 < plan["flop_ratio"]["sequential"] < plan["flop_ratio"]["none"] < plan["block_flop_ratio"]["none"]
    shown = runner.invoke(app, ["plan", "flowhn", "--size", "135M"]).stdout
    assert "attention takes" in shown and "predicted balance 1.0" in shown
    assert isinstance(runner.invoke(app, ["plan", "flowhn", "--size", "2B"]).exception, InputError)


def test_plan_measures_both_branches():
    result = runner.invoke(app, ["plan", "flowhn", "--size", "135M", "--length", "64", "--measure", "--json"])
    measured = json.loads(result.stdout)["measured"]
    assert measured["balance"] == measured["attention_ms"] / measured["ssm_ms"] > 0
    assert 0 <= measured["attention_tokens"] <= 64
