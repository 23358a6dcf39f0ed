"""``effcore plan ttc``: when could this training have stopped?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from effcore.methods.ttc import Decision


def ttc(
    results: Annotated[
        Path,
        typer.Argument(
            help="CSV: a row a checkpoint, with the columns tokens, 1, 2, 4, 8 (accuracy, 0 to 1, with so many samples)."
        ),
    ],
    budget: Annotated[
        float | None, typer.Option("--budget", help="Training tokens of the full run. Default: the last row's.")
    ] = None,
    items: Annotated[int, typer.Option("--items", min=1, help="Validation queries behind each accuracy.")] = 500,
    most_samples: Annotated[
        int, typer.Option("--most-samples", help="K_max: samples a query that you would pay for.")
    ] = 32,
    lifetime: Annotated[
        float | None,
        typer.Option("--lifetime", help="Tokens that the model will generate in its life, one sample a query."),
    ] = None,
    verifier: Annotated[
        float, typer.Option("--verifier", min=0, help="FLOPs of the verifier a token over the model's own (V/2N).")
    ] = 0.0,
    confidence: Annotated[float, typer.Option("--confidence", help="Of the bounds.")] = 0.9,
    margin: Annotated[
        float, typer.Option("--margin", help="Accuracy (0 to 1) that may be lost to the projection.")
    ] = 0.0,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw both curves, the stop and the bound (PNG).")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the decisions as JSON on standard output.")] = False,
) -> None:
    """The first checkpoint at which samples at test time make up for the rest of the training (TTC-aware training)."""
    from effcore.errors import RunError, input_error
    from effcore.methods.ttc import Costs, TTCPlan
    from effcore.training.ttc_plan import decide, draw, read_points

    points = read_points(results)
    try:
        plan = TTCPlan(
            points[-1][0] if budget is None else budget,
            items,
            most_samples,
            lifetime,
            Costs(verify=2 * verifier),
            confidence,
            margin,
        )
    except ValueError as error:
        raise input_error(error) from error
    decisions = decide(plan, points)
    if json_:
        print(json.dumps([decision.as_json() for decision in decisions]))
    else:
        _show(decisions)
    if plot is not None:
        try:
            draw(plot, plan, points, decisions)
        except (OSError, ValueError) as error:  # ValueError: matplotlib knows no such format
            reason = getattr(error, "strerror", None) or error
            raise RunError(f"--plot {plot}: cannot be written ({reason})") from error


def _show(decisions: list[Decision]) -> None:
    for decision in decisions:
        accuracy = f"{decision.accuracies[1]:.1%}"
        print(
            f"{decision.tokens:>12,.0f} tokens  {accuracy:>6}  {'stop' if decision.stop else 'go on'}: {decision.reason}"
        )
    last = decisions[-1]
    if last.stop:
        bound = f"{last.break_even:.3g}" if last.break_even is not None else "any number of"
        print(
            f"Stop at {last.tokens:,.0f} tokens and answer with {last.samples} samples: {last.saved:.0%} of the training FLOPs "
            f"saved; it pays up to {bound} generated tokens."
        )
        if last.measured is None:
            print(f"The accuracy with {last.samples} samples is a projection: measure it before you stop.")
    else:
        print("No checkpoint could have been the last.")
