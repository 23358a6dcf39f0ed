"""effcore compress: a small model there and back, and what it refuses."""

import json

import pytest
import torch

from effcore.data import byte_tokenizer
from effcore.methods.low_rank_checkpoint import load_decomposed
from effcore.nn.low_rank import LowRankLinear


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import transformers

    folder, tokenizer = tmp_path_factory.mktemp("model"), byte_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(capsys, *arguments):
    from effcore.cli.app import run

    with pytest.raises(SystemExit) as stop:
        run(["compress", *map(str, arguments)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_there_and_back(folder, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("a few words to see which shapes there are " * 20)
    code, out, err = run(
        capsys, folder, "--error", "0.9", "--text", text, "--length", "64", "-o", tmp_path / "out", "--json"
    )
    assert code == 0, err
    assert "compress: ranks 8/8" in err and "compress: factors 8/8" in err
    report = json.loads(out)
    assert report["target"] == "error 0.9" and (tmp_path / "out" / "report.png").is_file()
    model = load_decomposed(tmp_path / "out")
    replaced = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert len(replaced) == sum(x["rank"] is not None for x in report["layers"])
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_refusals(folder, tmp_path, capsys):
    out = tmp_path / "out"
    for arguments, message in (
        ((folder, "-o", out), "give one of --ratio, --error and --time, got none"),
        ((folder, "--ratio", "2", "--error", "0.1", "-o", out), "and --time, got --ratio and --error"),
        ((folder, "--ratio", "0.5", "-o", out), "ratio must be above 1, got 0.5"),
        ((tmp_path / "nothing", "--ratio", "2", "-o", out), "no such model"),
        ((folder, "--time", "0.5", "-o", out), "--time needs --text"),
        ((folder, "--ratio", "2", "--exclude", "[", "-o", out), "'[' is no regular expression"),
        ((folder, "--ratio", "2", "--text", tmp_path / "nothing", "-o", out), "no such file"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_nothing_is_written_over(folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("of another command")
    code, _, err = run(capsys, folder, "--ratio", "2", "-o", out, "--overwrite")
    assert code == 2 and "holds no result of this command" in err
    (out / "low_rank.json").write_text("before")
    code, _, err = run(capsys, folder, "--ratio", "2", "-o", out)
    assert code == 2 and "--overwrite replaces it" in err and (out / "low_rank.json").read_text() == "before"
    code, _, err = run(capsys, folder, "--ratio", "2", "-o", out, "--overwrite", "-q")
    assert code == 0 and err == ""
    code, _, err = run(capsys, folder, "--ratio", "2", "-o", folder)
    assert code == 2 and "the model is there" in err
    (tmp_path / "file").touch()
    assert run(capsys, folder, "--ratio", "2", "-o", tmp_path / "file")[0] == 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("mine")
    for more in ((), ("--overwrite",)):
        code, _, err = run(capsys, folder, "--ratio", "2", "-o", other, *more)
        assert code == 2 and "the folder is not empty and holds no result" in err
    assert [p.name for p in other.iterdir()] == ["config.json"]
    code, _, err = run(capsys, folder, "--ratio", "2", "-o", tmp_path / "file" / "inside")
    assert code == 2 and "is not a folder" in err


def test_an_interrupted_save_leaves_what_was_there(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert run(capsys, folder, "--ratio", "2", "-o", out, "-q")[0] == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("effcore.methods.low_rank_report.DecompositionReport.plot", interrupted)
    code, _, err = run(capsys, folder, "--error", "0.9", "-o", out, "--overwrite", "-q")
    assert (code, err) == (130, "effcore: interrupted\n")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_decomposed_model_generates_and_is_not_taken_for_a_dense_one(folder, tmp_path, capsys):
    from effcore.training.generation import complete
    from effcore.training.models import load_model

    out = tmp_path / "out"
    assert run(capsys, folder, "--error", "0.9", "-o", out, "-q")[0] == 0
    text = complete(str(out), "def ", max_new_tokens=6)["text"]
    model, (_, tokenizer) = load_decomposed(out), load_model(folder)
    ids = tokenizer("def ", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert text == tokenizer.decode(ids[0, -6:], skip_special_tokens=True)
    code, _, err = run(capsys, out, "--ratio", "2", "-o", tmp_path / "again")
    assert code == 2 and "a decomposed model" in err
