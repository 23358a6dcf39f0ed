"""``effcore train skipvit``: a small vision transformer whose patches skip blocks, beside the same one without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from effcore.cli.options import Seed


def skipvit(
    data: Annotated[
        Path | None,
        typer.Option("--data", help="A folder with one folder of pictures a class. Default: cluttered digits."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run folder.")] = Path("runs", "skipvit"),
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps.")] = 1500,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures a step.")] = 64,
    drop: Annotated[float, typer.Option("--drop", help="Share of the patches that leave.")] = 0.55,
    leave: Annotated[int, typer.Option("--leave", help="The first block without them, counted from 0 (of 6).")] = 3,
    rejoin: Annotated[int, typer.Option("--rejoin", help="The first block with all of them again.")] = 5,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps on all patches at first.")] = 100,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Its maximum.")] = 1e-3,
    seed: Seed = 0,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda. Default: cuda where there is one.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")] = False,
) -> None:
    """Patches that matter little skip some blocks (SkipViT): accuracy and images a second, with and without."""
    from effcore.cli.output import check_free
    from effcore.errors import InputError, input_error

    if not learning_rate > 0:
        raise InputError(f"--learning-rate must be positive, got {learning_rate}")
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got {device}")
    check_free(out, "skipvit", overwrite=overwrite)

    import torch

    from effcore.files import staged
    from effcore.methods.skipvit import SkipWarmup, keep_all_tokens, skip_tokens
    from effcore.training.images import accuracy, small_vit, train_classifier
    from effcore.training.models import quiet_transformers

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    training, test = _data(data)
    start = SkipWarmup(steps=warmup)
    models = {}
    for name in ("baseline", "skipvit"):
        torch.manual_seed(seed)
        models[name] = small_vit(training)
    try:
        skip_tokens(models["skipvit"], drop, leave, rejoin, warmup=start)
    except ValueError as error:
        raise input_error(error) from error
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        speed = train_classifier(
            model,
            training,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            device=device,
            warmup=start if name == "skipvit" else None,
            listener=None if quiet else _progress(name, steps),
        )
        row: dict[str, Any] = {
            "model": name,
            "accuracy": accuracy(model, test, count=1000, device=device),
            "images_per_second": speed,
        }
        if name == "skipvit":
            keep_all_tokens(model)
            row["accuracy_on_all_patches"] = accuracy(model, test, count=1000, device=device)
        rows.append(row)
    summary = {"drop": drop, "leave": leave, "rejoin": rejoin, "warmup": warmup, "steps": steps, "models": rows}
    with staged(out) as folder, quiet_transformers():
        for name, model in models.items():
            model.save_pretrained(folder / name)  # type: ignore[operator]
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if json_:
        print(json.dumps(summary))
    elif not quiet:
        for row in rows:
            print(f"{row['model']:<9} accuracy {row['accuracy']:.2%}  {row['images_per_second']:,.0f} images/s")
        print(f"skipvit on all patches: accuracy {rows[1]['accuracy_on_all_patches']:.2%}; see {out}")


def _data(folder: Path | None):
    from effcore.data.cluttered_digits import ClutteredDigits
    from effcore.data.image_folder import ImageFolder
    from effcore.errors import InputError

    if folder is not None:
        return ImageFolder(folder, "train", 64), ImageFolder(folder, "test", 64)
    try:
        return ClutteredDigits("train"), ClutteredDigits("test")
    except ImportError as error:
        raise InputError(f"{error}; or pass pictures with --data") from error


def _progress(name: str, steps: int):
    from effcore.cli.progress import lines

    show = lines(name)
    return lambda step, loss: show("step", step + 1, steps, f"loss {loss:.3f}")
