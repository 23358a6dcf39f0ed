"""What came out of runs, as one table: on the terminal, in ``report.md``, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Summary = dict[str, Any]

COLUMNS = (
    "run",
    "validation loss (nats/token)",
    "training tokens/s",
    "forward (ms/step)",
    "backward (ms/step)",
    "backward share",
    "KV cache (bytes/token)",
)


NOTE = (
    "Ratios and differences are to the first row. Training tokens/s is the mean of the whole run, with the time before the "
    "layers share; runs follow each other, so a machine that was busy during one distorts it. Forward and backward are medians "
    "of single steps in the final layout, measured in turns. The cache is counted at the precision of training."
)


def table_rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """One row a run, in the order of :data:`COLUMNS`. From the second on, numbers carry their ratio to the first run's."""
    base = summaries[0]

    def versus(summary: Summary, key: str, form: str) -> str:
        text = format(summary[key], form)
        if summary is base or not base[key]:
            return text
        return f"{text} ({summary[key] / base[key]:.2f}×)"

    rows = []
    for summary in summaries:
        difference = summary["validation_loss"] / base["validation_loss"] - 1
        loss = f"{summary['validation_loss']:.4f}" + ("" if summary is base else f" ({difference:+.1%})")
        rows.append(
            [
                summary["title"],
                loss,
                versus(summary, "tokens_per_second", ",.0f"),
                versus(summary, "forward_ms", ",.0f"),
                versus(summary, "backward_ms", ",.0f"),
                f"{summary['backward_share']:.0%}",
                versus(summary, "cache_bytes_per_token", ",d"),
            ]
        )
    return rows


def markdown_table(summaries: Sequence[Summary]) -> str:
    """:func:`table_rows` under their :data:`COLUMNS`, in Markdown."""
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *table_rows(summaries)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def title(summary: Summary) -> str:
    """``"epas qk, 6 of 8 layers share"``: what to call a run in tables and legends."""
    method = summary["method"]
    if method == "flowhn":
        return f"{method} {summary['mode']}"
    if not summary["shared_layers"]:
        return method if method == "baseline" else f"{method}, nothing shared"
    layers = len(summary["layout"].split("_"))
    return f"{method} {summary['mode']}, {summary['shared_layers']} of {layers} layers share"


def report(summaries: Sequence[Summary], plots: Sequence[str]) -> str:
    """The report of one run (with the run that it is compared to in front), or of a comparison, in Markdown."""
    last = summaries[-1]
    lines = [
        f"# {last['title']}" if len(summaries) <= 2 else "# Comparison of training runs",
        "",
        markdown_table(summaries),
        "",
        NOTE,
        "",
    ]
    lines += [f"![{name.removesuffix('.png')}](plots/{name})" for name in plots]
    lines += ["", "## Runs", ""]
    for summary in summaries:
        lines.append(
            f"- **{summary['title']}**: {summary['parameters']:,} parameters, {summary['steps']} steps, "
            f"{summary['tokens']:,} tokens of {summary['corpus']}, {summary['seconds']:.0f} s; "
            f"layout `{summary['layout']}`; "
            f"effcore {summary['version']}, torch {summary['torch']} on {summary['device']}"
        )
    return "\n".join(lines) + "\n"
