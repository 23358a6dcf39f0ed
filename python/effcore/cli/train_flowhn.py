"""``effcore train flowhn``: a FlowHN language model from scratch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def flowhn(
    recipe: Annotated[str, typer.Option("--recipe", help="A recipe's name or YAML file.")] = "fresh",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: --set strategy=none --set layers=6"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="A text file, a folder, a .jsonl or .parquet file. Default: the standard library."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The run folder.")] = Path("runs", "flowhn"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    against: Annotated[Path | None, typer.Option("--against", help="A finished run to compare with.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")] = False,
) -> None:
    """Attention and a state-space model side by side, tokens dealt to them by cost (FlowHN). Blocks: model.layers / 2."""
    from effcore.cli.train import is_main_process, run_training
    from effcore.errors import InputError
    from effcore.training.recipe import load_recipe

    if resume and (settings or data or overwrite):
        raise InputError("--resume continues a run with its own settings; leave out --set, --data and --overwrite")
    summary = run_training(
        "flowhn",
        load_recipe(recipe, settings, method="flowhn"),
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
    elif not quiet:
        print(
            f"{summary['title']}: validation loss {summary['validation_loss']:.4f}, "
            f"{summary['tokens_per_second']:,.0f} tokens/s; see {out / 'report.md'}"
        )
