"""Results as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import CallCost, Case
from benchmarks.ceilings import Ceilings
from benchmarks.gate import Verdict
from benchmarks.timing import Quartiles, Timings


@dataclass(frozen=True)
class Row:
    """A case as measured. A red one has no times."""

    case: Case
    verdict: Verdict
    timings: Timings = field(default_factory=lambda: Timings(()))
    peers: tuple[str, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> Quartiles:
        return self.timings.of(self.case.ours.name)

    def best_peer(self, prefix: str = "") -> str | None:
        """The peer with the smallest median among those whose name starts with ``prefix``."""
        names = [name for name in self.peers if name.startswith(prefix)]
        return min(names, key=lambda name: self.timings.of(name).median, default=None)

    def ratio_to(self, peer: str) -> Quartiles:
        return self.timings.ratio(self.case.ours.name, peer)

    def floor_ratio(self) -> float | None:
        """What the floor is held against; None without a floor or a peer that it speaks of."""
        if self.case.floor is None or not self.verdict.green:
            return None
        peer = self.best_peer(self.case.floor.against)
        return self.ratio_to(peer).median if peer is not None else None

    def met(self) -> bool | None:
        reached = self.floor_ratio()
        if self.case.floor is None or reached is None:
            return None
        return reached >= self.case.floor.ratio


@dataclass(frozen=True)
class CallRow:
    cost: CallCost
    times: dict[str, Quartiles]

    @property
    def above(self) -> float:
        """Microseconds of our call above what lies below it."""
        below = self.times["below"].median if "below" in self.times else 0.0
        return self.times["ours"].median - below

    def met(self) -> bool | None:
        return None if self.cost.limit is None else self.above <= self.cost.limit


def align(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as their widest cell; the first ``left`` to the left, the rest to the right."""
    table = [header, *rows]
    widths = [max(len(r[i]) for r in table) for i in range(len(header))]
    lines = [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))
        ).rstrip()
        for r in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 0.1 else f"{seconds * 1e3:.1f}"


def _rate(row: Row) -> str:
    work, seconds = row.case.work, row.ours.median
    if work.flops:
        rate = work.flops / seconds
        return f"{rate / 1e12:.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:.0f} GFLOP/s"
    return f"{work.bytes / seconds / 1e9:.1f} GB/s"


HEADER = ("case", "ours ms", "IQR", "best peer", "peer ms", "ratio", "ratio's quartiles", "rate", "ceiling", "floor")


def cells(row: Row, ceilings: Ceilings) -> list[str]:
    """One line of the table. A red gate prints its reason and no time."""
    if not row.verdict.green:
        return [row.case.name, "WRONG", *[""] * (len(HEADER) - 3), row.verdict.reason]
    peer = row.best_peer()
    ours = row.ours
    line = [row.case.name, _ms(ours.median) + ("" if row.timings.quiet else "~"), f"{ours.spread:.0%}"]
    if peer is None:
        line += ["none", "", "", ""]
    else:
        r = row.ratio_to(peer)
        line += [peer, _ms(row.timings.of(peer).median), f"{r.median:.2f}", f"{r.q1:.2f}-{r.q3:.2f}"]
    share = ceilings.seconds(row.case.work) / ours.median
    line += [_rate(row), f"{share:.0%}"]
    floor, met = row.case.floor, row.met()
    if floor is None:
        line.append("")
    elif met is None:
        line.append(f"{floor.ratio:g} (no peer)")
    else:
        line.append(f"{floor.ratio:g} {'met' if met else 'MISSED'} ({row.floor_ratio():.2f})")
    return line


def table(rows: Sequence[Row], ceilings: Ceilings) -> str:
    text = align(HEADER, [cells(row, ceilings) for row in rows])
    if any(row.verdict.green and not row.timings.quiet for row in rows):
        text += "\n~ other processes were busy all the while: not to be quoted"
    notes = [f"  {row.case.name}: {row.case.note}" for row in rows if row.case.note]
    return text + ("\n\nwhat the planner chooses:\n" + "\n".join(notes) if notes else "")


def call_table(rows: Sequence[CallRow]) -> str:
    header = ("call on the host, µs", "ours", "IQR", "below", "above it", "peers", "limit")
    lines = []
    for row in rows:
        ours, below = row.times["ours"], row.times.get("below")
        peers = ", ".join(f"{n} {t.median:.1f}" for n, t in row.times.items() if n not in ("ours", "below"))
        limit = "" if row.cost.limit is None else f"{row.cost.limit:g} {'met' if row.met() else 'MISSED'}"
        under = "" if below is None else f"{below.median:.1f}"
        lines.append(
            [row.cost.name, f"{ours.median:.1f}", f"{ours.spread:.0%}", under, f"{row.above:.1f}", peers, limit]
        )
    return align(header, lines)


def machine(device: str) -> dict[str, Any]:
    """Where the numbers come from."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            name = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    import effcore

    try:
        from effcore.array import build_info
    except ImportError:  # libraries that were carried to this machine, without the Python module
        build: dict[str, Any] = {}
    else:
        build = build_info()
    facts = {
        "cpu": name,
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "effcore": effcore.__version__,
        "build": build,
    }
    if device.startswith("cuda"):
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": _driver()}
    return facts


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.is_file() else "unknown"


def describe(facts: dict[str, Any], ceilings: Ceilings) -> str:
    """The machine and its ceilings in two lines."""
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads, {facts['build'].get('isa', '?')}"
    matmul = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in ceilings.matmul.items())
    return (
        f"{where} · torch {facts['torch']} · effcore {facts['effcore']} · load at the start {facts['load']:.1f}\n"
        f"ceilings: matmul {matmul} GFLOP/s, copy {ceilings.copy / 1e9:.1f} GB/s (read and written)"
    )


def _times(values: Quartiles) -> dict[str, float]:
    return {"q1": values.q1, "median": values.median, "q3": values.q3, "count": values.count}


def as_json(facts: dict[str, Any], ceilings: Ceilings, rows: Sequence[Row], calls: Sequence[CallRow]) -> dict[str, Any]:
    """Everything that was measured, in seconds, FLOP/s and bytes/s (calls: microseconds)."""
    cases = []
    for row in rows:
        entry: dict[str, Any] = {
            "name": row.case.name,
            "dtype": row.case.work.dtype,
            "gate": {"green": row.verdict.green, "reason": row.verdict.reason, "errors": row.verdict.errors},
            "absent": row.absent,
        } | ({"note": row.case.note} if row.case.note else {})
        if row.verdict.green:
            entry |= {
                "seconds": {name: _times(row.timings.of(name)) for name in (row.case.ours.name, *row.peers)},
                "quiet": row.timings.quiet,
                "ours": row.case.ours.name,
                "best_peer": row.best_peer(),
                "ratios": {name: _times(row.ratio_to(name)) for name in row.peers},
                "flops": row.case.work.flops,
                "bytes": row.case.work.bytes,
                "ceiling_share": ceilings.seconds(row.case.work) / row.ours.median,
            }
            if row.case.floor is not None:
                floor = row.case.floor
                entry["floor"] = {
                    "ratio": floor.ratio,
                    "against": floor.against,
                    "reached": row.floor_ratio(),
                    "met": row.met(),
                }
        cases.append(entry)
    costs = [
        {"name": r.cost.name, "times": {n: _times(t) for n, t in r.times.items()}, "above": r.above}
        | {"limit": r.cost.limit, "met": r.met()}
        for r in calls
    ]
    return {
        "machine": facts,
        "ceilings": {"matmul": ceilings.matmul, "copy": ceilings.copy},
        "cases": cases,
        "calls": costs,
    }


def write_json(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def plot(path: Path, results: dict[str, Any], title: str) -> None:
    """How many times as fast as the best peer each case is, with quartiles; floors as ticks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [c for c in results["cases"] if c["gate"]["green"] and c["best_peer"]][::-1]
    if not cases:
        return
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.32 * len(cases)))
    ends = []  # of what is drawn in each row
    for y, case in enumerate(cases):
        r = case["ratios"][case["best_peer"]]
        floor = case.get("floor", {})
        ends.append(max(r["q3"], floor.get("reached") or 0, floor.get("ratio", 0)))
        color = "#2f7f79" if r["median"] >= 1 else "#c46a3f"
        axes.barh(y, r["median"], height=0.62, color=color, alpha=1.0 if case["quiet"] else 0.35)
        axes.plot([r["q1"], r["q3"]], [y, y], color="#222", linewidth=1.2)
        axes.text(
            ends[-1],
            y,
            f"  {r['median']:.2f}× {case['best_peer']}{'' if case['quiet'] else ' (disturbed)'}",
            va="center",
            fontsize=7.5,
        )
        if "floor" in case:
            axes.plot([case["floor"]["ratio"]] * 2, [y - 0.4, y + 0.4], color="#222", linewidth=1.6, linestyle=":")
            if case["floor"]["reached"] is not None:
                axes.plot(case["floor"]["reached"], y, "D", color="#222", markersize=4)
    axes.axvline(1.0, color="#222", linewidth=0.8)
    axes.set_ylim(-0.8, len(cases) - 0.2)
    axes.set_yticks(range(len(cases)), [c["name"] for c in cases], fontsize=8)
    axes.set_xlim(0, 1.5 * max(ends))
    axes.set_xlabel(
        "times as fast as the best peer · dotted: the project's floor, diamond: what is held against it", fontsize=8
    )
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
