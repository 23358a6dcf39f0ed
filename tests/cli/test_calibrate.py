"""``effcore calibrate`` on a tiny mixture of experts, from its folder to its table; and what it refuses."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from effcore.cli.app import app
from effcore.data.byte_tokenizer import byte_tokenizer
from effcore.data.questions import Question, answer_tokens, batches, next_line_questions, read_questions
from effcore.data.sources import standard_library
from effcore.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import transformers as hf

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("moe")
    config = hf.Qwen2MoeConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_experts=3,
        num_experts_per_tok=1, moe_intermediate_size=8, intermediate_size=16, shared_expert_intermediate_size=8,
    )  # fmt: skip
    hf.Qwen2MoeForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def questions_file(path, count=20, choices=3):
    lines = [
        {"question": f"Line {i}?", "choices": ["x", "y", "z"][:choices], "answer": i % choices} for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_calibrate(folder, tmp_path):
    data = questions_file(tmp_path / "q.jsonl")
    out = tmp_path / "out"
    arguments = ["calibrate", str(folder), "--out", str(out), "--data", str(data), "--rank", "3", "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    scores = json.loads(result.stdout[result.stdout.index("{") :])
    assert {"MAP", "posterior"} <= set(scores["scores"])
    assert "fit: batch 2/2" in result.stderr and "prior: batch 1/1" in result.stderr
    assert sorted(p.name for p in out.iterdir()) == ["posterior.safetensors", "reliability.png", "scores.json"]


def test_bad_files_are_named(folder, tmp_path):
    data = tmp_path / "q.jsonl"
    row = {"question": "q", "choices": ["x", "y"], "answer": 0}
    for text, message in {
        "": "holds no questions",
        "{": "line 1: not valid JSON",
        "{}": "line 1: expected",
        json.dumps(row | {"answer": 2}): "line 1: answer must be from 0 to 1, got 2",
        json.dumps(row | {"choices": ["x"]}): "expected 2 to 26 choices, got 1",
        f"{json.dumps(row)}\n{json.dumps(row | {'choices': ['x', 'y', 'z']})}": "line 2: 3 choices, but the first.* has 2",
    }.items():
        data.write_text(text)
        with pytest.raises(InputError, match=message):
            read_questions(data)
    with pytest.raises(InputError, match="no such file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="at least 10 are needed"):
        CliRunner().invoke(
            app,
            ["calibrate", str(folder), "-o", str(tmp_path / "o"), "--data", str(questions_file(data, 4))],
            catch_exceptions=False,
        )


def test_bad_models_are_named_and_leave_no_folder(folder, tmp_path):
    import transformers as hf

    nothing, broken, silent, dense = (tmp_path / name for name in ("nothing", "broken", "silent", "dense"))
    nothing.mkdir()
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000])
    silent.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, silent)
    config = hf.LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    hf.LlamaForCausalLM(config).save_pretrained(dense)
    byte_tokenizer().save_pretrained(dense)
    for path, more, message in (
        (tmp_path / "none", [], "no such folder"),
        (nothing, [], "no model here"),
        (broken, [], "cannot be loaded"),
        (silent, [], "no usable tokenizer"),
        (dense, [], "LlamaForCausalLM has no experts"),
        (folder, ["--rank", "17"], "rank 17 is above both dimensions"),
        (folder, ["--hessian", "full"], "hessian must be one of"),
    ):
        with pytest.raises(InputError, match=message):
            CliRunner().invoke(
                app, ["calibrate", str(path), "-o", str(tmp_path / "o"), "--count", "10", *more], catch_exceptions=False
            )
        assert not (tmp_path / "o").exists()


def test_quiet_says_nothing_but_the_result(folder, tmp_path):
    arguments = ["calibrate", folder, "-o", "out", "--data", questions_file(tmp_path / "q.jsonl"), "--rank", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "effcore", *map(str, arguments), "--json", "--quiet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(json.loads(done.stdout)["scores"]) >= {"MAP", "posterior"}


def test_an_interrupted_fit_is_not_overwritten(folder, tmp_path):
    (tmp_path / "fit.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="--resume goes on with it"):
        CliRunner().invoke(app, ["calibrate", str(folder), "-o", str(tmp_path)], catch_exceptions=False)


def test_an_interruption_after_the_fit_loses_none_of_it(folder, tmp_path, monkeypatch, capsys):
    from effcore.cli import main
    from effcore.methods.laplace_posterior import Posterior

    def interrupted(*_):
        raise KeyboardInterrupt

    data, out = questions_file(tmp_path / "q.jsonl"), tmp_path / "out"
    arguments = ["calibrate", str(folder), "-o", str(out), "--data", str(data), "--rank", "3", "--json"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(Posterior, "fit_heldout", interrupted)
        main(arguments)
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith("effcore: interrupted; the same command with --resume goes on\n")
    assert [p.name for p in out.iterdir()] == ["fit.safetensors"]
    result = CliRunner().invoke(app, [*arguments, "--resume"], catch_exceptions=False)
    assert result.exit_code == 0 and "fit: batch" not in result.stderr and "prior: batch 1/1" in result.stderr
    assert not (out / "fit.safetensors").exists() and (out / "scores.json").exists()


def test_a_refusal_is_one_line_without_the_function_s_name(folder, tmp_path, capsys):
    from effcore.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["calibrate", str(folder), "-o", str(tmp_path / "out"), "--count", "10", "--hessian", "full"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "effcore: hessian must be one of lowrank, kron, diag, got 'full'\n"


def test_a_result_is_not_overwritten(folder, tmp_path):
    (tmp_path / "scores.json").write_text("before")
    with pytest.raises(InputError, match="--overwrite replaces it"):
        CliRunner().invoke(app, ["calibrate", str(folder), "-o", str(tmp_path)], catch_exceptions=False)
    assert (tmp_path / "scores.json").read_text() == "before"


def test_questions_of_real_text():
    files = standard_library()
    questions = next_line_questions(files, 30, seed=1)
    assert questions == next_line_questions(files, 30, seed=1) != next_line_questions(files, 30, seed=2)
    assert all(len(set(q.choices)) == 4 and 0 <= q.answer < 4 for q in questions)
    assert len({q.answer for q in questions}) == 4


def test_batches_keep_the_end_of_a_question():
    tokenizer = byte_tokenizer()
    questions = [Question("short", ("a", "b"), 1), Question("x" * 500, ("a", "b"), 0)]
    (batch,) = batches(questions, tokenizer, size=2, max_length=40)
    assert batch["input_ids"].shape == (2, 40) and batch["labels"].tolist() == [1, 0]
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        assert tokenizer.decode(row[mask.bool()]).endswith("Answer:")
    assert answer_tokens(tokenizer, 3) == [ord("A"), ord("B"), ord("C")]
