"""``effcore train baseline | epas | echo | skipvit | flowhn | swiftlearn``."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from effcore.cli import train_skipvit

app = typer.Typer(
    no_args_is_help=True,
    help="Train a model with one of the methods, or as it is, and keep what is needed to compare and resume.",
)

Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="A recipe's name or YAML file. Default: fresh, or continued with --model (swiftlearn: snippets, or finetune).",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe: --set training.steps=100"),
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Start from this checkpoint: a Hugging Face folder, a run folder or a GGUF file."),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="A text file, a folder, a .jsonl or .parquet file. Default: the Python standard library's sources. For swiftlearn "
        "texts with labels (.jsonl, .csv, .parquet with text and label; a folder a class). Default: snippets of packages.",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The run folder. Default: runs/METHOD.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")]
Against = Annotated[
    Path | None,
    typer.Option("--against", help="A finished run (the baseline) to compare with in the report and plots."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]


METHODS = {
    "baseline": "The model as it is, transformers' own class with PyTorch's attention: what the others are compared with.",
    "epas": "Progressive activation sharing (EPAS): more and more of the upper layers share Q,K (or K,V: --set mode=kv).",
    "echo": "Gradual conversion to shared keys and values (ECHO-LLaMA): one layer a stage; usually of a checkpoint (--model).",
    "flowhn": "Attention and a state-space model side by side, tokens dealt to them by cost (FlowHN); always from scratch.",
    "swiftlearn": "A text classifier on the samples that still move (SwiftLearn); --set keep=1 is training on all of them.",
}
_RECIPES = {"swiftlearn": ("snippets", "finetune")}  # from scratch, and of a checkpoint; the others: fresh, continued


def _add_command(method: str, description: str) -> None:
    @app.command(name=method, help=description)
    def train(
        recipe: Recipe = None,
        settings: Settings = None,
        model: Model = None,
        data: Data = None,
        out: Out = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
        against: Against = None,
        json_: Json = False,
        quiet: Quiet = False,
    ) -> None:
        from effcore.errors import InputError
        from effcore.training.recipe import load_recipe

        out = Path("runs", method) if out is None else out
        if resume:
            fixed = {"--recipe": recipe, "--set": settings, "--model": model, "--data": data, "--overwrite": overwrite}
            given = [name for name, value in fixed.items() if value]
            if given:
                raise InputError(f"--resume continues a run with its own settings; leave out {', '.join(given)}")
        if method == "flowhn" and model is not None:
            raise InputError("--model: FlowHN trains from scratch")
        default = _RECIPES.get(method, ("fresh", "continued"))[model is not None]
        loaded = load_recipe(recipe or default, settings, method=method)
        summary = run_training(
            method,
            loaded,
            model=model,
            data=data,
            out=out,
            resume=resume,
            overwrite=overwrite,
            against=against,
            quiet=quiet,
        )
        if not is_main_process():
            return
        if json_:
            print(json.dumps(summary))
        elif not quiet and method == "swiftlearn":
            print(
                f"{summary['title']}: accuracy {summary['accuracy']:.2%}, {summary['samples_trained_on']:,} samples "
                f"trained on, {summary['seconds']:.0f} s; see {out / 'report.md'}"
            )
        elif not quiet:
            cache = summary.get("cache_bytes_per_token")
            print(
                f"{summary['title']}: validation loss {summary['validation_loss']:.4f}, "
                f"{summary['tokens_per_second']:,.0f} tokens/s"
                f"{'' if cache is None else f', KV cache {cache:,} bytes/token'}; see {out / 'report.md'}"
            )


for _method, _description in METHODS.items():
    _add_command(_method, _description)
app.command(name="skipvit")(train_skipvit.skipvit)


def is_main_process() -> bool:
    """Whether this process of a torchrun speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def run_training(
    method: str,
    recipe: Any,
    *,
    model: str | None = None,
    data: str | None = None,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    against: Path | None = None,
    quiet: bool = False,
    label: str | None = None,
) -> dict[str, Any]:
    """:func:`effcore.training.run.train` with a progress display; Ctrl-C ends the program with one line and exit code 130."""
    from effcore.cli.progress import TrainingProgress

    with TrainingProgress(label or method, quiet=quiet or not is_main_process()) as progress:
        from effcore.training.folder import RunConfig
        from effcore.training.run import Interrupted, train

        if method == "swiftlearn":
            from effcore.training.classifier import train_classifier as train  # type: ignore[assignment]

        try:
            return train(
                RunConfig(method, recipe, model, data),
                out,
                resume=resume,
                overwrite=overwrite,
                against=against,
                listener=progress.update,
                total=progress.begin,
            )
        except Interrupted as interruption:
            progress.close()
            if is_main_process():
                command = f"effcore train {method} --out {shlex.quote(str(out))} --resume"
                print(f"effcore: interrupted after step {interruption.step}; continue with: {command}", file=sys.stderr)
            raise typer.Exit(130) from None
