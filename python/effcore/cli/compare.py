"""``effcore compare``: finished runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, the baseline first.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write report.md and plots/ into this folder.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often to time a step of each model.")] = 5,
    json_: Annotated[bool, typer.Option("--json", help="Print the summaries as JSON on standard output.")] = False,
) -> None:
    """One table of finished runs. Steps of the trained models are timed again, in turns: these ratios can be trusted."""
    from effcore.training.compare import compare_runs

    summaries = compare_runs(runs, rounds=rounds, out=out)
    if json_:
        print(json.dumps(summaries))
    else:
        print_table(summaries)


def print_table(summaries: list[dict[str, Any]]) -> None:
    """The comparison on the terminal."""
    from rich.console import Console
    from rich.table import Table

    from effcore.training.report import COLUMNS, NOTE, table_rows

    table = Table()
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in table_rows(summaries):
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
    console.print(NOTE, style="dim", highlight=False)
