"""What small networks of 3D convolutions learn of moving digits: which digit, and which of 8 directions."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.claims._conv3d_networks import METHODS, Make, normed
from effcore.data.moving_digits import MovingDigits


class Small(nn.Module):
    """Three convolutions, and a head for the digit and one for the direction."""

    def __init__(self, make: Make):
        super().__init__()
        widths = [(1, 16, 2), (16, 32, 2), (32, 64, 1)]
        self.body = nn.Sequential(*(nn.Sequential(make(c, o, stride=(1, s, s)), normed(o)) for c, o, s in widths))
        self.heads = nn.ModuleList([nn.Linear(64, MovingDigits.digits), nn.Linear(64, MovingDigits.directions)])

    def forward(self, clips: Tensor) -> list[Tensor]:
        features = self.body(clips).amax((2, 3, 4))
        return [head(features) for head in self.heads]


def train_and_test(make: Make, steps: int, seed: int, device: str, dtype: torch.dtype) -> list[float]:
    """Shares of 2000 test clips whose digit, direction, and both are right."""
    torch.manual_seed(seed)

    def precision():
        return torch.autocast(device, dtype, enabled=dtype != torch.float32)

    model = Small(make).to(device, memory_format=torch.channels_last_3d).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
    data, generator = MovingDigits("train"), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        clips, *targets = (t.to(device) for t in data.sample(32, generator))
        with precision():
            loss = sum(F.cross_entropy(out, target) for out, target in zip(model(clips), targets, strict=True))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    model.eval()
    test, generator = MovingDigits("test"), torch.Generator().manual_seed(10_000)
    right = torch.zeros(3)
    for _ in range(10):
        clips, *targets = (t.to(device) for t in test.sample(200, generator))
        with torch.no_grad(), precision():
            found = [out.argmax(1) == target for out, target in zip(model(clips), targets, strict=True)]
        right += torch.stack([*found, found[0] & found[1]]).float().sum(1).cpu()
    return (right / 2000).tolist()


def accuracy(
    device: str,
    dtype: torch.dtype,
    steps: int,
    seeds: list[int],
    names: list[str],
    held: list[dict[str, Any]],
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """A row a method. ``held``: rows whose runs are not made again; ``keep`` is called with all rows after each run."""
    rows = {row["method"]: row for row in held}
    for name in names:
        parameters = sum(p.numel() for p in Small(METHODS[name]).parameters())
        row = rows.setdefault(name, {"method": name, "parameters": parameters, "runs": {}})
        for seed in map(str, seeds):
            if seed not in row["runs"]:
                row["runs"][seed] = train_and_test(METHODS[name], steps, int(seed), device, dtype)
                keep(list(rows.values()))
    return [summary(row) for row in rows.values()]


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Means and spreads over a method's runs, printed."""
    text = f"{row['method']:<8} {row['parameters']:>7,} parameters, {len(row['runs'])} runs"
    for i, what in enumerate(("digit", "direction", "both")):
        right = [run[i] for run in row["runs"].values()]
        row[what] = {
            "accuracy": statistics.mean(right),
            "spread": statistics.stdev(right) if len(right) > 1 else 0.0,
        }
        text += f"  {what} {row[what]['accuracy']:.2%} ± {row[what]['spread']:.2%}"
    print(text, flush=True)
    return row


def join(files: list[Path]) -> dict[str, Any]:
    """One report of runs that were made apart (the same settings, other methods or seeds)."""
    reports = [json.loads(file.read_text()) for file in files]
    joined: dict[str, dict[str, Any]] = {}
    for row in (row for report in reports for row in report["rows"]):
        joined.setdefault(row["method"], row)["runs"].update(row["runs"])
    order = {name: i for i, name in enumerate(METHODS)}
    for row in joined.values():
        row["runs"] = dict(sorted(row["runs"].items()))
    rows = [summary(joined[name]) for name in sorted(joined, key=order.__getitem__)]
    settings = {k: v for k, v in reports[0]["settings"].items() if k not in ("only", "seeds")}
    return reports[0] | {"settings": settings, "rows": rows}
