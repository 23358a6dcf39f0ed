"""The command line as a user meets it: exit codes, one line an error, JSON that parses, help that comes at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from effcore.cli import main
from tests.training.tiny import TINY

EFFCORE = [sys.executable, "-m", "effcore"]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs a command in an empty folder; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    return call


CLASSIFIER = '{"title": "SwiftLearn", "accuracy": 0.5, "validation_loss": 0.7}'


@pytest.mark.parametrize("content", ["[]", "3", '{"title": "skipvit"}', "{", CLASSIFIER])
def test_a_summary_of_something_else_is_named(run, tmp_path, content):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "summary.json").write_text(content)
    for arguments in (["compare", "other"], ["train", "epas", "--against", "other"]):
        code, _, err = run(*arguments)
        assert code == 2 and err.startswith("effcore: other/summary.json: damaged")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_classifier_is_no_language_model(run, tmp_path, tied):
    import transformers

    from effcore.data import byte_tokenizer

    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=257, tie_word_embeddings=tied,
    )  # fmt: skip
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    byte_tokenizer().save_pretrained(tmp_path / "classifier")
    told = "but a LlamaForSequenceClassification" if tied else "it has no lm_head.weight"
    for arguments in (
        ["generate", "classifier", "-p", "x"],
        ["compress", "classifier", "--ratio", "2", "-o", "out"],
        ["calibrate", "classifier", "-o", "out", "--count", "10"],
    ):
        code, _, err = run(*arguments)
        last = err.splitlines()[-1]
        assert code == 2 and last.startswith("effcore: classifier: not a language model") and told in last


def test_what_a_function_refused_loses_the_function_s_name():
    from effcore.errors import input_error

    for told in ("effcore: bad x", "effcore.conv3d: bad x", "effcore.nn.conv3d: bad x", "bad x"):
        assert str(input_error(ValueError(told))) == "bad x"
        assert str(input_error(ValueError(told), "--x")) == "--x: bad x"
    assert str(input_error(ValueError("a: effcore.nn: b"))) == "a: effcore.nn: b"


def test_a_file_named_like_a_function_keeps_its_name(run):
    for arguments, told in (
        (["generate", "effcore.gguf", "-p", "x"], "effcore: effcore.gguf: no such model"),
        (["compare", "effcore"], "effcore: effcore: no finished run here"),
        (["calibrate", "effcore.laplace", "-o", "out", "--count", "10"], "effcore: effcore.laplace: no such folder"),
    ):
        code, _, err = run(*arguments)
        assert code == 2 and err.startswith(told) and err.count("\n") == 1


@pytest.fixture
def adapted(tmp_path):
    """Folders of a language model, of an adapter to it, and of both in one."""
    import peft
    import torch
    import transformers

    from effcore.data import byte_tokenizer

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    base, adapter, both = (tmp_path / name for name in ("base", "adapter", "both"))
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(base)
    model.save_pretrained(both)
    model.config.name_or_path = model.name_or_path = str(base)
    wanted = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, wanted)
    for folder in (adapter, both):
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        return base, adapter, both, tokens, model.eval()(tokens).logits


def without(name, *folders):
    from safetensors.torch import load_file, save_file

    for file in folders:
        weights = {key: value for key, value in load_file(file).items() if name not in key}
        save_file(weights, file, metadata={"format": "pt"})


def test_an_adapter_comes_with_its_whole_base(run, adapted):
    import torch

    from effcore.training.models import load_model

    _, _, _, tokens, wanted = adapted
    for folder in ("adapter", "both"):
        model, _ = load_model(folder, inference=True)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(tokens).logits, wanted)
        code, out, err = run("generate", folder, "-p", "x", "-n", "4", "--json")
        assert code == 0 and json.loads(out)["tokens"] <= 4, err
        code, out, err = run(
            *("calibrate", folder, "-o", f"{folder}-out", "--count", "10", "--max-length", "64"),
            *("--targets", "lora", "--rank", "1", "--json", "--quiet"),
        )
        assert code == 0 and "posterior" in json.loads(out)["scores"], err
        code, _, err = run("compress", folder, "--ratio", "2", "-o", "out")
        assert code == 2 and err.startswith(f"effcore: {folder}: an adapter, which can generate")


@pytest.mark.parametrize("lacking", ["lm_head", "lora_A"])
def test_an_adapter_and_its_base_must_be_whole(run, adapted, lacking):
    base, adapter, both, *_ = adapted
    if lacking == "lm_head":
        without(lacking, base / "model.safetensors", both / "model.safetensors")
    else:
        without(lacking, adapter / "adapter_model.safetensors", both / "adapter_model.safetensors")
    for folder, bad in (("adapter", base if lacking == "lm_head" else "adapter"), ("both", "both")):
        for arguments in (["generate", folder, "-p", "x"], ["calibrate", folder, "-o", "out", "--count", "10"]):
            code, _, err = run(*arguments)
            last = err.splitlines()[-1]
            assert code == 2 and last.startswith(f"effcore: {bad}: not a "), err
            assert lacking in last


def test_an_adapter_names_its_base(run, adapted):
    _, adapter, *_ = adapted
    for named, told in ((None, "adapter that names no base model"), ("adapter", "cannot be loaded")):
        settings = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": named}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        code, _, err = run("generate", "adapter", "-p", "x")
        assert code == 2 and told in err.splitlines()[-1]


def overrides(*more):
    return [part for setting in [*TINY, *more] for part in ("--set", setting)]


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys, time; began = time.perf_counter()\n"
        "from effcore.cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'effcore._core'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), time.perf_counter() - began)"
    )
    seconds = []
    for _ in range(3):  # the best of three: other programs run too
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        last = result.stdout.splitlines()[-1].split()
        assert last[:2] == ["HEAVY", "[]"]
        seconds.append(float(last[2]))
    assert min(seconds) < 0.5
    assert "train" in result.stdout and "generate" in result.stdout


@pytest.mark.parametrize("missing, command", [("typer", "doctor"), ("transformers", "generate here --prompt x")])
def test_a_missing_package_is_one_line(missing, command):
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom effcore.cli import main\nmain({command.split()!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert f"effcore: {missing} is not installed" in result.stderr


@pytest.mark.parametrize(
    "command", [[], ["train"], ["train", "epas"], ["generate"], ["doctor"], ["bench"], ["compare"], ["demo"]]
)
def test_every_command_explains_itself(run, command):
    code, out, err = run(*command, "--help")
    assert code == 0 and "Usage" in out and err == ""


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0 and out.startswith("effcore 0.")


def test_train_generate_compare(run, text, tmp_path):
    code, out, err = run("train", "baseline", "--data", text, *overrides(), "--json", "--quiet")
    assert (code, err) == (0, "")
    baseline = json.loads(out)
    code, out, _ = run("train", "epas", "--data", text, *overrides("mode=kv"), "--against", "runs/baseline")
    assert code == 0 and "epas kv, 2 of 4 layers share: validation loss" in out
    assert (tmp_path / "runs/epas/report.md").is_file()

    code, out, _ = run("compare", "runs/baseline", "runs/epas", "--rounds", 1, "--json", "--out", "both")
    summaries = json.loads(out)
    assert code == 0 and [s["method"] for s in summaries] == ["baseline", "epas"]
    assert summaries[0]["validation_loss"] == baseline["validation_loss"]
    assert (tmp_path / "both/plots/overview.png").is_file()
    code, out, _ = run("compare", "runs/baseline", "runs/epas", "--rounds", 1)
    assert code == 0 and "KV cache" in out and "×)" in out

    texts = {}
    for region in (0, 1, 2, None):
        option = [] if region is None else ["--region", region]
        code, out, _ = run("generate", "runs/epas", "--prompt", "def f", "-n", 8, "--json", *option)
        result = json.loads(out)
        assert code == 0 and result["tokens"] <= 8
        texts[result["layout"]] = result["text"]
    assert set(texts) == {"0_1_2_3", "0_1_2_2", "0_1_1_1"}
    code, out, _ = run("generate", "runs/epas", "--prompt", "def f", "-n", 8)
    assert code == 0 and out == texts["0_1_1_1"] + "\n"
    sampled = [
        run("generate", "runs/epas", "-p", "def f", "-n", 8, "--temperature", 1.0, "--seed", 3)[1] for _ in range(2)
    ]
    assert sampled[0] == sampled[1]

    code, _, err = run("generate", "runs/epas", "--prompt", "x", "--region", 3)
    assert (
        code == 2
        and err == "effcore: --region 3: the model was trained with 2 shared layers, and takes from 0 to that\n"
    )
    code, _, err = run("generate", "runs/epas", "--prompt", "x", "-n", 5000)
    assert code == 2 and "positions" in err
    code, _, err = run("train", "epas", "--data", text, *overrides())
    assert code == 2 and "continue it with --resume or replace it with --overwrite" in err
    code, _, err = run("train", "epas", "--resume", "--set", "steps=99")
    assert code == 2 and "leave out --set" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "epas", "--set", "modee=kv"], "unknown setting; did you mean 'mode'"),
        (["train", "epas", "--set", "epas.layout=0_2_2_3", "--set", "layers=4"], "points forward"),
        (["train", "baseline", "--set", "seed=-1"], "training.seed must be from 0 to"),
        (["train", "baseline", "--recipe", "frsh"], "did you mean 'fresh'"),
        (["train", "baseline", "--recipe", "none.yaml"], "no such file"),
        (["train", "baseline", "--data", "missing.txt"], "--data missing.txt: no such file or folder"),
        (["train", "echo", "--model", "missing"], "missing: no such model"),
        (["train", "echo", "--model", "broken"], "broken: cannot be loaded as a language model"),
        (["train", "echo", "--model", "broken.gguf"], "broken.gguf: "),
        (["train", "baseline", "--resume"], "runs/baseline: no run here"),
        (["train", "epas", "--against", "nowhere"], "--against nowhere: no finished run here"),
        (["generate", "missing", "--prompt", "x"], "missing: no such model"),
        (["generate", "broken", "--prompt", ""], "the text to continue is empty"),
        (["generate", "broken", "--prompt", "\udcff"], "the text to continue is not UTF-8"),
        (["compare", "nowhere"], "nowhere: no finished run here"),
        (["compare", "nowhere", "--out", "broken.gguf"], "--out broken.gguf: not a folder"),
        (["bench", "atention"], "did you mean 'attention'|part of the source checkout"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(run, tmp_path, arguments, words):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{broken")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    code, out, err = run(*arguments)
    import re

    assert code == (1 if "source checkout" in err else 2) and out == ""
    assert err.count("\n") == 1 and err.startswith("effcore: ") and re.search(words, err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["trane"],
        ["train", "nothing"],
        ["generate"],
        ["generate", "model", "--prompt", "x", "--seed", "-1"],
        ["train", "epas", "--layers", "3"],
    ],
)
def test_wrong_usage_is_exit_code_2(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2 and "Usage" in err


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), MemoryError()]
)
def test_a_model_that_memory_cannot_hold_is_one_line(run, text, monkeypatch, error):
    from effcore.training import models

    def build(*_):
        raise error

    monkeypatch.setattr(models, "fresh_model", build)
    code, _, err = run("train", "baseline", "--data", text, *overrides())
    assert (code, err) == (1, "effcore: out of memory: a smaller model, batch or length needs less\n")


def test_logits_that_are_not_numbers_are_not_sampled(run, text, tmp_path):
    from safetensors.torch import load_file, save_file

    assert run("train", "baseline", "--data", text, *overrides(), "--quiet")[0] == 0
    weights = tmp_path / "runs/baseline/model/model.safetensors"
    save_file({name: x * torch.nan for name, x in load_file(weights).items()}, weights, metadata={"format": "pt"})
    for more in ([], ["--temperature", 1]):
        code, _, err = run("generate", "runs/baseline", "-p", "def", *more)
        assert code == 1 and err.startswith("effcore: the model's logits hold NaN") and err.count("\n") == 1


def test_ctrl_c_saves_and_resume_repeats_the_uninterrupted_run(text, tmp_path):
    """The real thing: a process, a signal, exit code 130, one line, and then the same losses to the last bit."""
    settings = overrides("steps=40", "checkpoint_every=100", "echo.steps_per_stage=10")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out, *more):
        command = [*EFFCORE, "train", "echo", "--out", out, *more]
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    whole = start("whole", "--data", str(text), *settings, "--quiet")
    assert whole.communicate()[1] == "" and whole.returncode == 0

    process = start("two parts", "--data", str(text), *settings, "--quiet")
    metrics = tmp_path / "two parts" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while (not metrics.is_file() or metrics.read_text().count("\n") < 12) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == "" and err.count("\n") == 1
    assert err.startswith("effcore: interrupted after step ") and err.endswith(
        "effcore train echo --out 'two parts' --resume\n"
    )

    resumed = start("two parts", "--resume", "--json", "--quiet")
    out, err = resumed.communicate(timeout=120)
    assert (resumed.returncode, err) == (0, "")
    assert json.loads(out)["steps"] == 40
    losses = [
        [(row["step"], row["kind"], row["loss"]) for row in map(json.loads, (tmp_path / name / "metrics.jsonl").open())]
        for name in ("whole", "two parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 50


def test_full_disk_is_one_line(text, tmp_path):
    code = (
        "import resource, sys\n"
        "from effcore.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "main(sys.argv[1:])"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "train",
        "baseline",
        "--data",
        str(text),
        *overrides("log_every=4"),
        "--quiet",
    ]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 1
    assert (
        result.stderr.count("\n") == 1 and "the disk is full" in result.stderr and "nothing was saved" in result.stderr
    )


def test_demo_replaces_no_run_that_is_not_its_own(run, tmp_path):
    (tmp_path / "runs/epas-qk").mkdir(parents=True)
    (tmp_path / "runs/epas-qk/config.yaml").write_text("of a long run")
    code, _, err = run("demo", "--quiet", "--out", "runs", *overrides("steps=3"))
    assert code == 2 and err.startswith("effcore: --out runs/epas-qk: a run is here;")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["epas-qk"]


def test_demo_trains_three_models_and_compares_them(run, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFCORE_CACHE", str(tmp_path / "cache"))
    code, out, err = run("demo", "--quiet", *overrides("steps=3"))
    assert (code, err) == (0, "")
    assert out.count("│ epas") == 2 and "baseline" in out and "report.md" in out
    assert (tmp_path / "runs/demo/plots/overview.png").is_file()
    assert "| epas kv, " in (tmp_path / "runs/demo/report.md").read_text()


def test_results_of_a_benchmark_go_where_the_user_is(run, tmp_path, monkeypatch):
    """The runner works in the checkout; beside an installed package that is one of the test's own."""
    runner = tmp_path / "checkout/benchmarks/run.py"
    runner.parent.mkdir(parents=True)
    runner.touch()
    monkeypatch.setattr(
        "effcore.__path__", [*sys.modules["effcore"].__path__, str(tmp_path / "checkout/python/effcore")]
    )
    commands = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: commands.append(command) or subprocess.CompletedProcess(command, 0)
    )
    code, _, _ = run("bench", "routing", "--json", "results.json")
    assert code == 0 and commands[0][-2:] == ["--json", str(tmp_path / "results.json")]
