"""``effcore demo``: a small LLaMA trained with and without shared activations, at equal tokens, and a table of the outcome."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

PLACE = Path("runs/demo")
_RUNS = (("baseline", "baseline", None), ("epas", "epas-qk", "epas.mode=qk"), ("epas", "epas-kv", "epas.mode=kv"))


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where the run folders, the report and the plots go.")
    ] = PLACE,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the runs in --out; those in the default place are always.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the summaries as JSON on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")] = False,
) -> None:
    """Trains a small LLaMA three times, as it is and with EPAS in modes qk and kv; about three minutes on two cores.

    The text is the Python standard library, byte by byte. The same by hand: effcore train baseline --recipe demo,
    effcore train epas --recipe demo, effcore compare runs/baseline runs/epas.
    """
    from effcore.cli.compare import print_table
    from effcore.cli.train import run_training
    from effcore.training.folder import RunFolder
    from effcore.training.recipe import load_recipe

    recipes = [
        load_recipe("demo", [*(settings or []), *([mode] if mode else [])], method=method) for method, _, mode in _RUNS
    ]
    overwrite = overwrite or out == PLACE
    for _, name, _ in _RUNS:
        RunFolder(out / name).check_free(overwrite=overwrite)
    for recipe, (method, name, _) in zip(recipes, _RUNS, strict=True):
        run_training(method, recipe, out=out / name, overwrite=overwrite, quiet=quiet, label=name)
    from effcore.training.compare import compare_runs

    summaries = compare_runs([out / name for _, name, _ in _RUNS], out=out)
    if json_:
        print(json.dumps(summaries))
        return
    print_table(summaries)
    print(
        f"Report: {out / 'report.md'}   plots: {out / 'plots'}   try: effcore generate {out / 'epas-qk'} --prompt 'def '"
    )
