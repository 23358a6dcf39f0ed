"""``effcore plan ttc | flowhn``."""

from __future__ import annotations

import typer

from effcore.cli import plan_flowhn, plan_ttc

app = typer.Typer(no_args_is_help=True, help="Decide before you train, or while: when to stop, how to split a hybrid.")
app.command(name="ttc")(plan_ttc.ttc)
app.command(name="flowhn")(plan_flowhn.flowhn)
