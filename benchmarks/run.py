"""``python -m benchmarks.run <family>``: times an op family against its peers. Exit status 1 where a result is wrong."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import torch

import benchmarks.ops
from benchmarks import ceilings, gate, report, timing
from benchmarks.case import CallCost, Case, Settings
from benchmarks.quiet import quiet_for
from benchmarks.report import CallRow, Row

RESULTS = Path(__file__).parent / "results"


def use_carried_libraries() -> None:
    """EFFCORE_LIBRARIES names folders with lib/libeffcore_*.so, for machines on which effcore is not installed."""
    import effcore

    effcore.__path__.extend(filter(None, os.environ.get("EFFCORE_LIBRARIES", "").split(os.pathsep)))


def families() -> list[str]:
    modules = pkgutil.iter_modules(benchmarks.ops.__path__)
    return sorted(m.name.removeprefix("bench_") for m in modules if m.name.startswith("bench_"))


def measure(case: Case, settings: Settings, clock: timing.Clock, seconds: float, patience: float = 0.0) -> Row:
    """The gate, and behind it the times."""
    inputs = case.inputs()
    verdict, peers, absent = gate.judge(case, inputs)
    if not verdict.green:
        return Row(case, verdict, absent=absent)
    timings = timing.interleave(
        {c.name: c for c in (case.ours, *peers)},
        timing.input_sets(inputs, settings.device),
        clock,
        seconds=seconds,
        patience=patience,
        quiet=quiet_for(settings.device),
    )
    return Row(case, verdict, timings, tuple(peer.name for peer in peers), absent)


def measure_calls(costs: Iterator[CallCost], settings: Settings) -> list[CallRow]:
    rows = []
    for cost in costs:
        calls = {"ours": cost.ours} | ({"below": cost.below} if cost.below else {}) | cost.peers
        synchronize = torch.cuda.synchronize if settings.cuda else None
        rows.append(
            CallRow(
                cost, timing.microseconds_a_call(calls, rounds=5 if settings.quick else 15, synchronize=synchronize)
            )
        )
    return rows


def run(
    module: ModuleType,
    settings: Settings,
    *,
    seconds: float,
    patience: float = 0.0,
    only: str = "",
    log: TextIO = sys.stderr,
) -> tuple[dict[str, Any], str, bool]:
    """The family's results, their table, and whether every gate was green."""
    cases = [c for c in module.cases(settings) if re.search(only, c.name)]
    limits = ceilings.measure(settings.device, module.DTYPES)
    facts = report.machine(settings.device)
    clock = timing.clock_for(settings.device)
    rows: list[Row] = []
    calls: list[CallRow] = []
    try:
        for number, case in enumerate(cases, 1):
            print(f"[{number}/{len(cases)}] {case.name}", file=log, flush=True)
            rows.append(measure(case, settings, clock, seconds, patience))
            torch.compiler.reset()
            if settings.cuda:
                torch.cuda.empty_cache()
        costs = getattr(module, "calls", lambda _: ())(settings)
        calls = measure_calls((c for c in costs if re.search(only, c.name)), settings)
    except KeyboardInterrupt:
        print("interrupted: what was measured so far", file=log)
    limits = limits.or_better(ceilings.measure(settings.device, module.DTYPES))
    text = "\n\n".join(
        [report.describe(facts, limits)]
        + ([report.table(rows, limits)] if rows else [])
        + ([report.call_table(calls)] if calls else [])
    )
    absent = {f"{name}: {why}" for row in rows for name, why in row.absent.items()}
    if absent:
        text += "\n\npeers that do not run here:\n" + "\n".join(f"  {line}" for line in sorted(absent))
    return report.as_json(facts, limits, rows, calls), text, all(row.verdict.green for row in rows)


def matches(module: ModuleType, settings: Settings, only: str) -> bool:
    """Whether the family has a case or a call whose name ``only`` finds."""
    makers = (module.cases, getattr(module, "calls", lambda _: ()))
    return any(re.search(only, entry.name) for maker in makers for entry in maker(settings))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("family", choices=families())
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture of the ratios (PNG)")
    parser.add_argument(
        "--save", action="store_true", help="both, as benchmarks/results/<device>/<family>.json and .png"
    )
    parser.add_argument("--quick", action="store_true", help="small cases, no compiled peers: a minute or so")
    parser.add_argument("--no-compile", action="store_true", help="leave out the peers that go through torch.compile")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--seconds", type=float, metavar="S", help="time for each case (default 10; quick: 1)")
    parser.add_argument(
        "--patience",
        type=float,
        default=20.0,
        metavar="S",
        help="longest wait for a quiet machine, each case (default 20)",
    )
    options = parser.parse_args(arguments)

    settings = Settings(options.device, options.quick, compiled=not (options.quick or options.no_compile))
    if settings.cuda and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no CUDA device")
    if not settings.cuda and settings.device != "cpu":
        parser.error(f"--device must be cpu or cuda, got {options.device}")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads must be positive, got {options.threads}")
        torch.set_num_threads(options.threads)
    try:
        re.compile(options.only)
        for file in filter(None, (options.json, options.plot)):  # before minutes of measuring
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a folder", str(file))
    except re.error as error:
        parser.error(f"--only {options.only}: no regular expression: {error}")
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    torch.manual_seed(0)
    use_carried_libraries()
    module = importlib.import_module(f"benchmarks.ops.bench_{options.family}")
    if not matches(module, settings, options.only):
        parser.error(f"--only {options.only}: {options.family} has no case of such a name")
    seconds = options.seconds if options.seconds is not None else (1.0 if options.quick else 10.0)
    results, text, green = run(module, settings, seconds=seconds, patience=options.patience, only=options.only)
    print(text)
    if options.save:
        folder = RESULTS / slug(results["machine"].get("gpu") or "cpu")
        options.json = options.json or folder / f"{options.family}.json"
        options.plot = options.plot or folder / f"{options.family}.png"
    if options.json:
        report.write_json(options.json, results)
    if options.plot:
        where = results["machine"].get("gpu") or f"{results['machine']['cpu']}, {results['machine']['threads']} threads"
        report.plot(options.plot, results, f"effcore.{options.family} on {where}, torch {results['machine']['torch']}")
    return 0 if green else 1


def slug(name: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'nvidia-h100-80gb-hbm3'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
