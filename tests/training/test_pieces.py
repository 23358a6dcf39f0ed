"""Recipes, state files, staging of checkpoints, tables: the parts of a run on their own."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError

from effcore.errors import InputError
from effcore.files import staged, write_atomically
from effcore.methods.vds_run import RunFiles
from effcore.training import checkpoint
from effcore.training.metrics_file import read_metrics, truncate_metrics
from effcore.training.models import _resolve
from effcore.training.recipe import Recipe, TrainingSettings, built_in_recipes, load_recipe, recipe_from_dict
from effcore.training.report import markdown_table, title
from effcore.training.trainer import training_arguments


def test_built_in_recipes_load():
    assert {"fresh", "continued", "demo"} <= set(built_in_recipes())
    for name in built_in_recipes():
        assert isinstance(load_recipe(name), Recipe)


def test_recipes_survive_yaml():
    recipe = load_recipe("fresh", ["epas.layout=0_0_2_2_4_4_6_6", "learning_rate=2e-5"])
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(recipe.as_dict()))) == recipe


def test_numbers_are_those_of_json(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("training: {learning_rate: 2e-5, steps: 1e3}\nepas: {layout: 0_0_2_2}\n")
    recipe = load_recipe(path)
    assert (recipe.training.learning_rate, recipe.training.steps, recipe.epas.layout) == (2e-5, 1000, "0_0_2_2")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steeps=3", "unknown setting; did you mean 'steps'"),
        ("training.lerning_rate=1", "did you mean 'training.learning_rate'"),
        ("xyzzy=1", "--set xyzzy: unknown setting$"),
        ("steps=many", "training.steps must be a whole number, got 'many'"),
        ("steps=2.5", "training.steps must be a whole number, got 2.5"),
        ("steps=true", "training.steps must be a whole number, got True"),
        ("steps=0", "training.steps must be positive, got 0"),
        ("compile=1", "training.compile must be true or false, got 1"),
        ("epas.max_shared=x", "epas.max_shared must be a whole number or null, got 'x'"),
        ("mode=both", "epas.mode must be qk or kv, got 'both'"),
        ("layout=0_1", "ambiguous, say epas.layout or echo.layout"),
        ("hidden_size=100", "model.hidden_size / heads must be even|multiple of heads"),
        ("steps", "expected key=value"),
        ("steps=[1", "is not a YAML value"),
    ],
)
def test_bad_overrides_say_what_was_expected(override, words):
    with pytest.raises(InputError, match=words) as caught:
        load_recipe("fresh", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: {stepps: 3}", "unknown setting 'training.stepps'; did you mean 'steps'"),
        ("trainning: {}", "unknown setting 'trainning'; did you mean 'training'"),
        ("training: 3", "training must be a section with settings, got 3"),
        ("- 1", "expected sections"),
        ("a: [", "line 1: not valid YAML"),
    ],
)
def test_bad_recipe_files(text, words, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        load_recipe(tmp_path / "r.yaml")


def test_sharding_is_refused_where_it_would_replicate(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(InputError, match=r"training\.sharded.*torchrun"):
        training_arguments(TrainingSettings(sharded=True), tmp_path, shares=True)
    assert not training_arguments(TrainingSettings(), tmp_path, shares=True).fsdp


def test_one_process_works_on_one_device(tmp_path, monkeypatch):
    """Where there are more GPUs the Trainer would wrap the model in DataParallel."""
    arguments = training_arguments(TrainingSettings(), tmp_path, shares=True)
    arguments._setup_devices  # noqa: B018  (sets what follows)
    monkeypatch.setattr(arguments, "_n_gpu", 8)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == TrainingSettings().batch_size


def test_recipes_that_do_not_exist():
    with pytest.raises(InputError, match="did you mean 'fresh'"):
        load_recipe("frsh")
    with pytest.raises(InputError, match="no such file"):
        load_recipe("missing.yaml")


def test_tree_round_trip(tmp_path):
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 5: {}},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.95), "fused": None, "params": [0, 5]}],
        "bfloat16": torch.randn(4).bfloat16(),
        "big": 2**80,
        "inf": float("inf"),
        "array": np.arange(3, dtype=np.uint32),
        "fractions": np.array([0.5, -1.25]),
        "view": torch.arange(6).reshape(2, 3).T,
    }
    checkpoint.save_tree(tmp_path / "t.safetensors", tree)
    again = checkpoint.load_tree(tmp_path / "t.safetensors")
    assert list(again) == list(tree)
    assert again["groups"] == tree["groups"] and again["big"] == 2**80 and again["inf"] == float("inf")
    assert list(again["state"]) == [0, 5] and torch.equal(again["state"][0]["exp_avg"], tree["state"][0]["exp_avg"])
    assert again["bfloat16"].dtype == torch.bfloat16 and torch.equal(again["bfloat16"], tree["bfloat16"])
    assert again["array"].dtype == np.uint32 and again["array"].tolist() == [0, 1, 2]
    assert again["fractions"].dtype == np.float64 and again["fractions"].tolist() == [0.5, -1.25]
    assert torch.equal(again["view"], tree["view"])
    with pytest.raises(TypeError, match="cannot save a PosixPath"):
        checkpoint.save_tree(tmp_path / "u.safetensors", {"x": Path()})
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="damaged"):
        checkpoint.load_tree(tmp_path / "bad.safetensors")


def test_random_states_come_back(tmp_path):
    checkpoint.save_tree(tmp_path / "r.safetensors", checkpoint.random_state())
    first = (random.random(), np.random.rand(), torch.rand(3))
    checkpoint.set_random_state(checkpoint.load_tree(tmp_path / "r.safetensors"))
    again = (random.random(), np.random.rand(), torch.rand(3))
    assert first[:2] == again[:2] and torch.equal(first[2], again[2])


def make_checkpoint(folder, step, content):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "trainer_state.json").write_text(content)


def test_staging_publishes_whole_folders_or_none(tmp_path):
    run = tmp_path / "run"
    with staged(run) as staging:
        make_checkpoint(staging, 4, "old")
        assert checkpoint.checkpoints(run) == []
    with staged(run) as staging:
        make_checkpoint(staging, 4, "new")
    assert (run / "checkpoint-4" / "trainer_state.json").read_text() == "new"
    with pytest.raises(OSError, match="the disk is full"), staged(run) as staging:
        make_checkpoint(staging, 4, "broken")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert [path.name for path in run.iterdir()] == ["checkpoint-4"]
    assert (run / "checkpoint-4" / "trainer_state.json").read_text() == "new"


def test_a_death_between_two_moves_loses_no_folder(tmp_path, monkeypatch):
    with staged(tmp_path) as staging:
        make_checkpoint(staging, 4, "old")
    rename, moves = Path.rename, []

    def dying(path, place):
        moves.append(place)
        if len(moves) > 1:
            raise KeyboardInterrupt
        return rename(path, place)

    monkeypatch.setattr(Path, "rename", dying)
    with pytest.raises(KeyboardInterrupt), staged(tmp_path) as staging:
        make_checkpoint(staging, 4, "new")
    monkeypatch.undo()
    assert checkpoint.checkpoints(tmp_path) == []  # it is aside
    with staged(tmp_path):
        assert (tmp_path / "checkpoint-4" / "trainer_state.json").read_text() == "old"


def test_a_run_of_vds_ttt_finds_the_state_that_was_aside(tmp_path):
    RunFiles(tmp_path, {"queries": "hash"})
    (tmp_path / ".in-progress" / ".replaced" / "online").mkdir(parents=True)
    RunFiles(tmp_path, {"queries": "hash"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "online"]


def test_files_are_moved_after_folders(tmp_path, monkeypatch):
    rename, moved = Path.rename, []
    monkeypatch.setattr(Path, "rename", lambda path, place: (moved.append(path.name), rename(path, place)))
    with staged(tmp_path) as staging:
        (staging / "a.json").write_text("")
        make_checkpoint(staging, 4, "")
        (staging / "b").mkdir()
    assert moved == ["b", "checkpoint-4", "a.json"]


def test_a_failed_write_keeps_the_old_text_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    write_atomically(tmp_path / "a.json", "old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_checkpoints_are_ordered_by_step_and_incomplete_ones_ignored(tmp_path):
    for step in (10, 9, 100):
        make_checkpoint(tmp_path, step, "")
    (tmp_path / "checkpoint-200").mkdir()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
    ]
    checkpoint.keep_latest(tmp_path, 2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]


def test_metrics_forget_what_a_resumed_run_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert len(read_metrics(path)) == 3
    assert truncate_metrics(path, 2) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert truncate_metrics(tmp_path / "new.jsonl", 0) == []


def test_table_compares_with_the_first_run():
    base = {
        "title": "baseline",
        "validation_loss": 2.0,
        "tokens_per_second": 1000.0,
        "forward_ms": 100.0,
        "backward_ms": 200.0,
        "backward_share": 2 / 3,
        "cache_bytes_per_token": 800,
    }
    other = base | {"title": "epas", "validation_loss": 2.02, "tokens_per_second": 1250.0, "cache_bytes_per_token": 400}
    assert markdown_table([base, other]).splitlines()[2:] == [
        "| baseline | 2.0000 | 1,000 | 100 | 200 | 67% | 800 |",
        "| epas | 2.0200 (+1.0%) | 1,250 (1.25×) | 100 (1.00×) | 200 (1.00×) | 67% | 400 (0.50×) |",
    ]


def test_titles():
    assert (
        title({"method": "epas", "mode": "qk", "layout": "0_1_1_1", "shared_layers": 2})
        == "epas qk, 2 of 4 layers share"
    )
    assert title({"method": "baseline", "mode": None, "layout": "0_1", "shared_layers": 0}) == "baseline"


def test_a_model_comes_before_a_folder_in_it_that_is_called_model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert _resolve(tmp_path)[0] == tmp_path / "model"
    (tmp_path / "config.json").write_text("{}")
    assert _resolve(tmp_path)[0] == tmp_path
    (tmp_path / "config.json").write_text('{"queries": "of a run"}')
    assert _resolve(tmp_path)[0] == tmp_path / "model"
