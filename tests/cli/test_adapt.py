"""``effcore adapt`` on tiny models."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification
from typer.testing import CliRunner

from effcore.data import byte_tokenizer
from effcore.errors import InputError, RunError
from tests.methods.test_sampling import model as tiny_model


@pytest.fixture
def places(tmp_path):
    tiny_model().float().save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=258,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=257,
        )
    ).save_pretrained(tmp_path / "verifier")
    for name in ("model", "verifier"):
        byte_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"prompt": f"{i}+{i}=", "answer": 2 * i} for i in range(5)]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def invoke(places, *arguments):
    from effcore.cli.app import app

    given = ["adapt", places / "model", "--queries", places / "queries.jsonl", "--verifier", places / "verifier"]
    given += ["--out", places / "run", "-n", 3, "--max-new-tokens", 4, "--rank", 2, "--epochs", 1, "-q"]
    return CliRunner().invoke(app, [str(part) for part in [*given, *arguments]])


def test_run_folder_report_and_merged_model(places):
    result = invoke(places, "--threshold", 0.1, "--merge", "--held-out", places / "queries.jsonl")
    assert result.exit_code == 0, result.output
    assert "Trained on 5 of 5 queries" in result.output and "after, held out" in result.output
    names = {p.name for p in (places / "run").iterdir()}
    assert names >= {
        "config.json",
        "pool-0.jsonl",
        "scores-0.jsonl",
        "selected-0.jsonl",
        "adapter-0",
        "model",
        "report.md",
    }
    from effcore.training.models import load_model

    load_model(places / "run")  # its model/, as of any run folder
    assert isinstance(invoke(places).exception, InputError)
    again = invoke(places, "--threshold", 0.1, "--resume", "--json")
    assert json.loads(again.output)["selected"] == [5]
    assert "(threshold differ)" in str(invoke(places, "--threshold", 0.2, "--resume").exception)
    result = invoke(places, "--threshold", 1.0, "--overwrite")
    assert result.exit_code == 0 and "the model is unchanged" in result.output
    with pytest.raises(InputError, match="with --merge it also saves the model"):
        load_model(places / "run")


def test_a_full_disk_is_one_line_and_loses_nothing(places, monkeypatch):
    from peft import PeftModel
    from safetensors import SafetensorError

    def full(self, folder, **_):
        (folder / "adapter_model.safetensors").write_bytes(b"what fits")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    result = invoke(places, "--threshold", 0.1)
    assert isinstance(result.exception, RunError) and "continue with --resume" in str(result.exception)
    assert len((places / "run" / "scores-0.jsonl").read_text().splitlines()) == 5
    monkeypatch.undo()
    assert "Trained on 5 of 5" in invoke(places, "--threshold", 0.1, "--resume").output


def test_training_that_diverges_is_one_line(places):
    for epochs in (1, 3):  # found by the samples of the trained model; by the loss
        result = invoke(places, "--threshold", 0.1, "--learning-rate", 1e30, "--epochs", epochs, "--overwrite")
        assert isinstance(result.exception, RunError)


def test_a_damaged_adapter_is_named(places):
    invoke(places, "--threshold", 0.1)
    weights = places / "run" / "adapter-0" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10])
    result = invoke(places, "--threshold", 0.1, "--resume")
    assert isinstance(result.exception, InputError) and "adapter-0: the adapter is damaged" in str(result.exception)


def test_a_verifier_that_returns_nan_is_one_line_and_loses_nothing(places):
    from safetensors.torch import load_file, save_file

    whole = places / "verifier" / "model.safetensors"
    weights = load_file(whole)
    save_file(weights | {"score.weight": weights["score.weight"] * torch.nan}, whole, metadata={"format": "pt"})
    result = invoke(places, "--threshold", 0.1)
    assert isinstance(result.exception, InputError) and "score nan is not from 0 to 1" in str(result.exception)
    assert "what was drawn is in" in str(result.exception)
    assert len((places / "run" / "pool-0.jsonl").read_text().splitlines()) == 5
    save_file(weights, whole, metadata={"format": "pt"})
    assert "Trained on 5 of 5" in invoke(places, "--threshold", 0.1, "--resume").output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--queries", "nowhere.jsonl"], "no such file"),
        (["--verifier", "nowhere"], "--verifier nowhere: no model here"),
        (["--max-new-tokens", "5000"], "more than the model's"),
        (["--verifier-kind", "oracle"], "must be classifier or process"),
        (["--compare", "taste"], "must be number or text"),
        (["--threshold", "2"], "threshold must be from 0 to 1"),
        (["--resume"], "no run here"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, places):
    result = invoke(places, *arguments)
    assert isinstance(result.exception, InputError) and message in str(result.exception)


def test_a_model_without_positions_takes_any_length():
    from types import SimpleNamespace

    from transformers import MambaConfig

    from effcore.training.adapt import _check_lengths
    from effcore.training.models import check_length

    model = SimpleNamespace(config=MambaConfig())
    _check_lengths(model, byte_tokenizer(), ["1+1="], 10**6)
    check_length(model, 10**6)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "holds no queries"),
        ("{oops\n", "line 1: not valid JSON"),
        ("5\n", "line 1: expected an object, got int"),
        ('{"text": "a"}\n', "a text in the field 'prompt'"),
        ('{"prompt": "a", "answer": 1}\n{"prompt": "b"}\n', "1 of 2 queries have an answer"),
    ],
)
def test_bad_queries(content, message, places):
    (places / "queries.jsonl").write_text(content)
    result = invoke(places)
    assert isinstance(result.exception, InputError) and message in str(result.exception)


def test_a_verifier_without_a_head_is_refused(places):
    tiny_model().float().save_pretrained(places / "verifier")
    result = invoke(places)
    assert isinstance(result.exception, InputError)
    assert "not a trained classifier: the file has no score.weight" in str(result.exception)
    assert not (places / "run").exists()


def test_a_verifier_that_names_no_padding_pads_as_its_tokenizer(places):
    file = places / "verifier" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "pad_token_id"}))
    assert invoke(places, "--threshold", 0.1).exit_code == 0


def test_only_a_run_is_overwritten(places):
    before = sorted(path.name for path in (places / "model").iterdir())
    for place, message in (("model", "holds no run of this command"), ("queries.jsonl", "not a folder")):
        result = invoke(places, "--out", places / place, "--overwrite")
        assert isinstance(result.exception, InputError) and message in str(result.exception)
    assert sorted(path.name for path in (places / "model").iterdir()) == before


def test_an_interruption_says_how_to_go_on(places, monkeypatch, capsys):
    from effcore.cli import main

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("effcore.methods.vds_ttt.VerifierTTT._transductive", interrupted)
    arguments = ["adapt", places / "model", "--queries", places / "queries.jsonl", "--verifier", places / "verifier"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--out", str(places / "run"), "-q", "--max-new-tokens", "4"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "effcore: interrupted; the same command with --resume goes on\n"


def test_an_interruption_before_the_old_run_is_replaced_gives_no_hint(places, monkeypatch, capsys):
    from effcore.cli import main

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    (places / "run").mkdir()
    (places / "run" / "config.json").write_text('{"queries": "of the old run"}')
    monkeypatch.setattr("effcore.training.adapt.load_model", interrupted)
    arguments = ["adapt", places / "model", "--queries", places / "queries.jsonl", "--verifier", places / "verifier"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--out", str(places / "run"), "--overwrite", "-q"])
    assert ended.value.code == 130 and capsys.readouterr().err == "effcore: interrupted\n"
