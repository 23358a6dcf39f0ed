"""Results of a claim, kept run by run: what a file already holds is not run again, and parts from several processes are one
result."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# What may differ between the parts of a result.
ANYWHERE = {"json", "seeds", "device", "merge", "seconds", "tokens", "model", "prepare", "small", "compile", "time"}
ANYWHERE |= {"arms", "peaks", "stages", "tune", "full_peaks"}


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Machine and settings, as they stand at the head of a result."""
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    settings = {name: value for name, value in vars(options).items() if name not in ANYWHERE}
    return {"machine": machine, "torch": torch.__version__, "settings": json.loads(json.dumps(settings, default=str))}


def kept(path: Path, head: dict[str, Any]) -> list[dict]:
    """The runs that ``path`` holds, whose machine's name goes into ``head``; exits where they are of other settings."""
    if not path.is_file():
        return []
    held = json.loads(path.read_text())
    if other := differing(head["settings"], held["settings"]):
        sys.exit(f"{path} holds runs with another {other}: give another --json, or remove it")
    head |= {name: held[name] for name in ("machine", "torch")}
    return held["runs"]


def differing(settings: dict[str, Any], held: dict[str, Any]) -> str:
    """The names of ``settings`` that have another value in ``held``, which came out of a file; empty where there are none."""
    return ", ".join(k for k, v in settings.items() if held.get(k) != v)


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def merge(paths: Sequence[Path]) -> dict[str, Any]:
    """Head and runs of parts with equal settings, in the order of their seeds; exits where they differ."""
    head = {k: v for k, v in json.loads(paths[0].read_text()).items() if k in ("machine", "torch", "settings")}
    runs = {run["seed"]: run for path in paths for run in kept(path, head)}
    return head | {"runs": [runs[seed] for seed in sorted(runs)]}
