"""Fills the tables of docs/flowhn.md from the kept results: `python -m benchmarks.claims.flowhn_tables`.

What stands between `<!-- NAME -->` and `<!-- /NAME -->` is replaced by the table of that name; a table whose results are
missing stays empty.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.claims import _hybrids as hybrids
from benchmarks.tables import put, table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FAC = hybrids.STRATEGIES["fac"]


def _rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}_h200.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def _speed(name: str) -> str:
    """tokens/s of each model, and by how much FAC is faster: measured, by FLOPs, and in the paper (1B)."""
    rows = []
    for row in _rows(name):
        cells = [row["model"], f"{row['tokens/s']:,.0f}", f"{row['mfu']:.1%}"]
        if row["model"] == FAC:
            cells += ["", "", ""]
        else:
            paper = (
                f"{hybrids.PAPER[FAC][0] / hybrids.PAPER[row['model']][0]:.2f}" if row["model"] in hybrids.PAPER else ""
            )
            cells += [f"{row['fac_ratio']:.2f} ({row['reached']:.0%} of it)", f"{row['predicted_ratio']:.2f}", paper]
        rows.append(cells)
    return table(["", "tokens/s", "MFU", "FAC is faster by", "FLOPs say", "the paper's 1B"], rows)


def _peers(*names: str) -> str:
    rows = [
        [
            row["model"],
            "effcore" if row["model"] == FAC else row["kernels"],
            "yes" if row["compiled"] else "no",
            f"{row['size']}, {row['batch']}",
            f"{row['tokens/s']:,.0f}",
            f"{row['mfu']:.1%}",
            "" if row["model"] == FAC else f"{row['fac_ratio']:.2f}",
        ]
        for name in names
        for row in _rows(name)
    ]
    return table(["", "kernels", "layers compiled", "size, texts", "tokens/s", "MFU", "FAC is faster by"], rows)


def _profile(name: str) -> str:
    rows = [r for r in _rows(name) if "ms" in r]
    return table(
        ["kernels of FAC's blocks", "ms", "share"], [[r["kind"], f"{r['ms']:.2f}", f"{r['share']:.1%}"] for r in rows]
    )


def _moving(name: str) -> str:
    for row in _rows(name):
        if row["kind"] == "moving tokens":
            return (
                f"FAC's blocks take {row['moved_ms']:.2f} ms, and {row['in place_ms']:.2f} ms where every token is left where "
                f"it is: moving tokens costs {row['share']:.1%}."
            )
    return ""


def _decode(name: str) -> str:
    rows = [[r["model"], r.get("how", "as it is"), f"{r['ms']:.2f}", f"{r['slowest_ms']:.2f}"] for r in _rows(name)]
    return table(["", "steps", "ms a token", "slowest"], rows)


def _loss(name: str) -> str:
    seeds = sorted({row["seed"] for row in _rows(name)})
    rows = []
    for model in hybrids.STRATEGIES.values():
        found = {row["seed"]: row["validation_loss"] for row in _rows(name) if row["model"] == model}
        shown = [f"{found[seed]:.4f}" if seed in found else "" for seed in seeds]
        rows.append([model, *shown, f"{hybrids.PAPER[model][2]:.2f}"])
    return table(["nats a byte", *(f"seed {seed}" for seed in seeds), "the paper's 1B, accuracy"], rows)


def _scan(name: str) -> str:
    path = RESULTS / f"{name}_h200.json"
    rows = []
    for row in json.loads(path.read_text())["times"] if path.is_file() else []:
        if "shape" not in row:
            continue
        ms, bounds = row["ms"], row["bounds_ms"]
        batch, tokens, channels = row["shape"]
        cells = [f"{batch} x {tokens:,} x {channels:,}, {row['states']}", f"{ms['forward']:.3f}"]
        # As our goal counts: one special function more, for a logarithm. In two passes: all that both take.
        functions = row["states"] + 3
        counts = [functions, functions + 1, 2 * functions - 2 if row.get("passes") == 2 else functions]
        cells += [f"{max(bounds['bytes'], bounds['instructions'] * n / functions) / ms['forward']:.0%}" for n in counts]
        for ours, theirs in (("forward", "peer forward"), ("both", "peer both")):
            if ours == "both":
                cells.append(f"{ms['both']:.3f}")
            cells.append(f"{ms[theirs]:.3f} ({ms[theirs] / ms[ours]:.2f}x)")
        rows.append(cells)
    header = ["B x L x E, N", "forward, ms", "of the bound", "as our goal counts", "of its passes' bound", "mamba-ssm"]
    return table([*header, "forward + backward, ms", "mamba-ssm"], rows)


def _profiled(name: str) -> str:
    """Of the scan's forward by Nsight Compute: what a token of 32 channels takes of a scheduler. A kernel's part of the file
    begins with `# kernel; B x L x E, N`."""
    path = RESULTS / f"{name}_h200.txt"
    rows = []
    for part in path.read_text().split("\n# ")[1:] if path.is_file() else []:
        kernel, shape = part.splitlines()[0].split("; ")
        batch, tokens, channels, _ = (int(n.replace(",", "")) for n in re.split(" x |, ", shape))
        found = dict(re.findall(r"^ +(\S.*?) {2,}(?:\S+ +)?([\d,.]+) *$", part, re.M))
        value = {k: float(v.replace(",", "")) for k, v in found.items()}
        works = batch * tokens * channels / 32
        cycles = 528 * value["Elapsed Cycles"] / works  # of a scheduler; there are 528
        wavefronts = value["l1tex__data_pipe_lsu_wavefronts.sum"] / works
        special = value["smsp__inst_executed_pipe_xu.sum"] / works
        cells = [kernel, shape, f"{value['Active Warps Per Scheduler']:.1f}", f"{cycles:.0f}"]
        cells += [f"{value['Executed Instructions'] / works:.0f}", f"{special:.0f}", f"{wavefronts:.0f}"]
        cells += [f"{8 * special + 2 * wavefronts:.0f}", f"{8 * special / cycles:.0%}"]
        rows.append(cells)
    header = ["", "B x L x E, N", "warps a scheduler", "cycles", "instructions", "special functions", "accesses"]
    return table([*header, "8 and 2 cycles for these", "special functions busy"], rows)


TABLES: dict[str, Callable[[str], str]] = {
    "flowhn_train": _speed,
    "flowhn_train_135M": _speed,
    "flowhn_train_1B": _speed,
    "flowhn_blocks": _speed,
    "flowhn_peers": lambda name: _peers(name, "flowhn_peers_compiled", "flowhn_peers_sizes"),
    "flowhn_peers_installed": _peers,
    "flowhn_profile": _profile,
    "flowhn_decode": _decode,
    "flowhn_loss": _loss,
    "scan_check": _scan,
    "scan_forward_ncu": _profiled,
}


def fill(text: str) -> str:
    for name, make in TABLES.items():
        text = put(text, name, make(name))
    return put(text, "flowhn_moving", _moving("flowhn_profile"))


def main() -> int:
    page = ROOT / "docs" / "flowhn.md"
    page.write_text(fill(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
