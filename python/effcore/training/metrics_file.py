"""What a run writes down while it trains: one JSON object a line, in ``metrics.jsonl``.

``{"kind": "train", ...}`` rows hold means since the row before; ``{"kind": "validation", ...}`` rows hold the loss on the
held-out windows. Losses are in nats a token, times in seconds without validation and checkpoints, ``tokens`` counts those
trained on so far.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from effcore.files import write_atomically

Row = dict[str, Any]


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics file; a last line that was cut off by a crash is left out."""
    rows: list[Row] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def truncate_metrics(path: Path, last_step: int) -> list[Row]:
    """Forgets the rows after ``last_step``, which a resumed run writes again; returns those that stay."""
    rows = [row for row in read_metrics(path) if row["step"] <= last_step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows
