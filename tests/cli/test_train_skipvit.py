"""``effcore train skipvit`` and its data."""

import json

import pytest
import torch
from typer.testing import CliRunner

from effcore.data.image_folder import ImageFolder
from effcore.errors import InputError


def pictures(folder, classes=2, count=3):
    from PIL import Image

    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (80 + i, 70), (120 * label, 10 * i, 99)).save(folder / f"class{label}" / f"{i}.png")
    return folder


def invoke(*arguments):
    from effcore.cli.app import app

    return CliRunner().invoke(app, ["train", "skipvit", *map(str, arguments)])


def test_trains_on_a_folder_of_pictures(tmp_path):
    data, out = pictures(tmp_path / "data"), tmp_path / "run"
    result = invoke(
        "--data", data, "--out", out, "--steps", 4, "--batch-size", 2, "--warmup", 2, "--device", "cpu", "--json", "-q"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    summary = json.loads((out / "summary.json").read_text())
    assert [row["model"] for row in summary["models"]] == ["baseline", "skipvit"]
    assert all(0 <= row["accuracy"] <= 1 for row in summary["models"])
    assert (out / "skipvit" / "model.safetensors").exists()
    with pytest.raises(InputError, match="a result is here"):
        raise invoke("--data", data, "--out", out).exception


def test_a_folder_that_cannot_be_made_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("--data", pictures(tmp_path / "data"), "--out", tmp_path / "file" / "run", "--steps", 1)
    assert isinstance(result.exception, InputError) and "loss" not in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--leave", 5, "--rejoin", 5], "leave must be below rejoin"),
        (["--drop", 1.5], "drop must be at least 0 and below 1"),
        (["--learning-rate", 0], "--learning-rate must be positive"),
        (["--learning-rate", "nan"], "--learning-rate must be positive"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
    ],
)
def test_bad_settings_are_named_before_anything_is_trained(tmp_path, arguments, message):
    data = pictures(tmp_path / "data")
    with pytest.raises(InputError, match=message):
        raise invoke("--data", data, "--out", tmp_path / "run", *arguments).exception


def test_a_run_of_another_command_is_not_overwritten(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("of a baseline")
    with pytest.raises(InputError, match="holds no result of this command"):
        raise invoke("--data", tmp_path, "--out", tmp_path / "run", "--overwrite").exception
    assert (tmp_path / "run" / "summary.json").read_text() == "of a baseline"


def test_image_folder(tmp_path):
    folder = pictures(tmp_path / "data", classes=3, count=12)
    training, test = ImageFolder(folder, "train", 32), ImageFolder(folder, "test", 32)
    assert (len(training), len(test), training.classes) == (30, 6, 3)
    images, labels = test.sample(5, torch.Generator().manual_seed(0))
    assert images.shape == (5, 3, 32, 32) and images.abs().max() <= 1 and set(labels.tolist()) <= {0, 1, 2}
    again, _ = test.sample(5, torch.Generator().manual_seed(0))
    assert torch.equal(images, again)
    (folder / "class0" / "1.png").write_text("no picture")
    with pytest.raises(InputError, match="not a picture"):
        for _ in range(20):
            training.sample(8)
    with pytest.raises(InputError, match="not a folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="at least 2 classes"):
        ImageFolder(tmp_path)


def test_cluttered_digits():
    pytest.importorskip("sklearn")
    from effcore.data.cluttered_digits import ClutteredDigits

    data = ClutteredDigits("test", size=48)
    images, labels = data.sample(6, torch.Generator().manual_seed(3))
    assert images.shape == (6, 1, 48, 48) and labels.shape == (6,)
    assert images.min() >= -1 and images.max() <= 1
    again, _ = data.sample(6, torch.Generator().manual_seed(3))
    assert torch.equal(images, again)
    with pytest.raises(ValueError, match="split must be"):
        ClutteredDigits("validation")
    with pytest.raises(ValueError, match="size must be at least 16"):
        ClutteredDigits(size=8)
