"""``effcore train swiftlearn`` from labelled texts to a run folder, stopped and resumed."""

import csv
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from effcore.data.labelled import load_labelled
from effcore.errors import InputError
from effcore.training.classifier import train_classifier
from effcore.training.folder import RunConfig, RunFolder
from effcore.training.recipe import load_recipe
from effcore.training.run import Interrupted

TINY = ["layers=1", "hidden_size=32", "heads=2", "kv_heads=2", "mlp_size=32", "data.length=32", "batch_size=8"]
TINY += ["epochs=5", "keep=0.2", "checkpoint_every=7", "validate_every=9", "log_every=1", "learning_rate=0.003"]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    words = ("red", "blue", "green", "black")
    rows = [{"text": f"{words[i % 4]} is number {i} of {i * 7919}", "label": words[i % 4]} for i in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def invoke(*arguments):
    from effcore.cli.app import app

    settings = [part for setting in TINY for part in ("--set", setting)]
    return CliRunner().invoke(app, ["train", "swiftlearn", *settings, *map(str, arguments)])


def test_run_folder_and_comparison(texts, tmp_path):
    full, few = tmp_path / "full", tmp_path / "few"
    result = invoke("--data", texts, "--out", full, "--set", "keep=1", "-q")
    assert result.exit_code == 0, result.output
    result = invoke("--data", texts, "--out", few, "--against", full, "--json", "-q")
    assert result.exit_code == 0, result.output
    summary = json.loads((few / "summary.json").read_text())
    samples = summary["samples"]
    assert summary["samples_trained_on"] == 2 * samples + 3 * round(0.2 * samples) and 0 <= summary["accuracy"] <= 1
    assert {p.name for p in few.iterdir()} >= {"config.yaml", "metrics.jsonl", "model", "report.md", "summary.json"}
    report = (few / "report.md").read_text()
    assert "all samples" in report and "SwiftLearn, keep 0.2, gumbel" in report and "×" in report
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(few / "model")
    assert set(model.config.label2id) == {"red", "blue", "green", "black"}
    again = invoke("--data", texts, "--out", few)
    assert isinstance(again.exception, InputError) and "--resume" in str(again.exception)


def test_interrupted_and_resumed_equals_uninterrupted_bitwise(texts, tmp_path):
    config = RunConfig("swiftlearn", load_recipe("snippets", TINY, method="swiftlearn"), data=str(texts))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_classifier(config, whole)

    def listener(row):
        if row["step"] == 26 and row["kind"] == "train":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train_classifier(config, parts, listener=listener)
    train_classifier(config, parts, resume=True)
    rows = lambda folder: [(r["kind"], r["step"], r["loss"]) for r in RunFolder(folder).metrics()]  # noqa: E731
    assert rows(parts) == rows(whole)
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    texts.write_text(texts.read_text() + json.dumps({"text": "more", "label": "red"}) + "\n")
    (parts / "summary.json").unlink()
    with pytest.raises(InputError, match="have changed since the run began"):
        train_classifier(config, parts, resume=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set", "keep=0"], "swiftlearn: keep must be above 0"),
        (["--set", "select=best"], "select must be gumbel, topk or random"),
        (["--set", "kep=0.1"], "did you mean 'keep'"),
        (["--data", "nowhere.jsonl"], "no such file"),
        (["--model", "nowhere"], "no such model"),
        (["--resume", "--set", "keep=0.2"], "leave out --set"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, texts, tmp_path):
    data = [] if "--data" in arguments or "--resume" in arguments else ["--data", texts]
    result = invoke("--out", tmp_path / "run", *data, *arguments)
    assert isinstance(result.exception, InputError) and message in str(result.exception), result.output
    assert not (tmp_path / "run").exists()


def test_labelled_texts_of_every_form(texts, tmp_path):
    want = load_labelled(texts)
    assert len(want.train) + len(want.validation) == 90 and want.classes == ["black", "blue", "green", "red"]
    table = tmp_path / "texts.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["body", "kind"])
        writer.writerows((row["text"], row["label"]) for row in map(json.loads, texts.read_text().splitlines()))
    assert load_labelled(table, text_field="body", label_field="kind").fingerprint == want.fingerprint
    for label in "ab":
        (tmp_path / "folder" / label).mkdir(parents=True)
        for i in range(40):
            (tmp_path / "folder" / label / f"{i}.txt").write_text(f"{label} {i}")
    assert load_labelled(tmp_path / "folder").classes == ["a", "b"]
    assert len(load_labelled(texts, most=50, validation_fraction=0.3).train) < 50


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "t.jsonl",
            '{"text": "a", "label": "x"}\n{"text": "b"}\n',
            r"row 2: no field 'label' \(there are \['text'\]\)",
        ),
        ("t.jsonl", "{oops\n", "line 1: not valid JSON"),
        ("t.jsonl", "[1]\n", "line 1: expected an object"),
        ("t.csv", "text,label\n\udcff,a\n", "not a CSV file"),
        ("t.jsonl", '{"text": "a", "label": "x"}\n' * 5, r"needs at least 2 classes, found \['x'\]"),
        ("t.jsonl", "", "found no texts"),
        ("t.csv", "text\na\n", "row 1: no field 'label'"),
        ("t.doc", "", "end in .jsonl"),
        ("t.parquet", "no", "not a parquet file"),
        ("t.jsonl", '{"text": "a", "label": "x"}\n{"text": "a", "label": "y"}\n', "is left for validation"),
    ],
)
def test_bad_labelled_texts(name, content, message, tmp_path):
    (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=message):
        load_labelled(tmp_path / name)
