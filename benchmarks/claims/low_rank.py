"""Low rank's claims: `python -m benchmarks.claims.low_rank speed | layers | parts | short | search | progressive | smollm |
table`.

speed: ResNets at 2× against the same model (on a GPU in bfloat16, channels_last, compiled), images a second of training and of
inference, beside the paper's gains (arXiv 2407.20266), and where a step goes. Random weights: speed does not depend on them.
Rows that the file of --json has already are not measured again.

layers: their convolutions one by one, at dense and at reduced widths, beside the roofline's times.

parts: the stem and the narrow convolutions that models of `speed` have, beside torch's.

short: which layers, of the ranks that a file of `speed` (--ranks) found for training, save less than the roofline says.

search: how long `decompose` takes on a ResNet-152 and on a LLaMA of 1.2 G parameters.

progressive: a small LLaMA trained on PyTorch's sources, its MLPs 16× smaller in one step, in several, or in one whose cut-off
part fades: equal size, equal tokens, each with a learning rate of its own.

smollm: SmolLM2-135M's perplexity at several ratios, plain against data-aware SVD, without training.

table: what a file of these, or of benchmarks/ops/lowrank_cuda.py, holds, as Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path = [str(ROOT), *sys.path, str(ROOT / "python")]  # an installed effcore, with its libraries, before the sources

from benchmarks.claims._low_rank_recovery import FADING, ONE, STAGES, place  # noqa: E402
from benchmarks.claims._runs import differing  # noqa: E402
from benchmarks.run import use_carried_libraries  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.low_rank", description=__doc__)
    parser.add_argument(
        "claim", choices=("speed", "layers", "parts", "short", "search", "progressive", "smollm", "table")
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--depths", type=int, nargs="+", default=[50], choices=(50, 101, 152))
    parser.add_argument(
        "--batch", type=int, help="images (speed; default 256 on cuda, 4 on cpu); sequences (progressive; default 8)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="(speed)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        help='some variants: merging "timed ranks" (speed); stem (layers); fading stages "one step" (progressive)',
    )
    parser.add_argument("--warm", action="store_true", help="compile for the caches and measure nothing (speed)")
    parser.add_argument(
        "--at-once", type=int, default=2, help="processes that compile (speed) or train (progressive) at a time"
    )
    parser.add_argument(
        "--plans",
        type=int,
        help="cuDNN's kernels that are tried for a convolution, 0 for all; else it chooses itself (layers)",
    )
    parser.add_argument("--ranks-only", action="store_true", help="time layers for their ranks, and stop (speed)")
    parser.add_argument("--no-profile", action="store_true", help="do not say where a step goes (speed)")
    parser.add_argument("--no-training", action="store_true", help="inference alone (speed)")
    parser.add_argument("--no-inference", action="store_true", help="training alone (speed)")
    parser.add_argument("--steps", type=int, default=400, help="training steps of the dense model (progressive)")
    parser.add_argument(
        "--recovery", type=int, nargs="+", default=[100], help="training steps after decomposing (progressive)"
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="that are reported (progressive)")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1.4e-3, 2e-3, 2.8e-3, 4e-3], help="to begin with (progressive)"
    )
    parser.add_argument("--refine", action="store_true", help="go on around the best rates (progressive)")
    parser.add_argument("--tuning", type=int, default=100, help="the seed on which settings are found (progressive)")
    parser.add_argument("--dense", type=Path, help="a folder that keeps the dense models for other runs (progressive)")
    parser.add_argument("--width", type=int, default=64, help="(progressive)")
    parser.add_argument("--layers", type=int, default=2, help="(progressive)")
    parser.add_argument(
        "--ratios", type=float, nargs="+", help="(progressive, one, default 16; smollm, default 1.25 1.5 2)"
    )
    parser.add_argument("--windows", type=int, default=24, help="of 256 tokens, held out (smollm)")
    parser.add_argument("--ranks", type=Path, help="a file of speed (short)")
    parser.add_argument("--json", type=Path, help="write the numbers; read them (table)")
    parser.add_argument("--picture", type=Path, help="draw the rows of speed or progressive (table)")
    options = parser.parse_args(arguments)
    if options.claim in ("layers", "parts", "short") and options.device != "cuda":
        parser.error(f"{options.claim} needs a GPU")
    if options.claim == "table" and not (options.json and options.json.is_file()):
        parser.error(f"table reads the file that --json names, got {options.json}")
    if options.claim == "progressive" and len(options.ratios or ()) > 1:
        parser.error("progressive takes one of --ratios")
    known = _known(options.claim)
    if unknown := sorted(set(options.only) - set(known)):
        parser.error(f"--only names {'; '.join(unknown)}: {options.claim} has {'; '.join(known) or 'no variants'}")
    if options.claim == "table":
        from benchmarks.claims import _low_rank_tables

        print(_low_rank_tables.table(options.json))
        if options.picture:
            _low_rank_tables.picture(options.json, options.picture)
        return 0
    use_carried_libraries()
    rows: list[dict[str, Any]] = []
    ranks: dict[str, dict[str, Any]] = {}  # those that timing found
    machine = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    head: dict[str, Any] = {"claim": options.claim, "machine": machine, "torch": torch.__version__}
    if options.claim == "progressive":
        names = ("width", "layers", "steps", "batch", "ratios", "tuning")
        head["settings"] = {name: getattr(options, name) for name in names}
    if options.claim in ("speed", "progressive") and options.json and options.json.exists():  # go on where it ended
        before = json.loads(options.json.read_text())
        if "settings" in head and (other := differing(head, {"settings": None} | before)):
            parser.error(f"{options.json} holds runs with another {other}: give another --json, or remove it")
        rows, ranks = before["rows"], before.get("ranks", {})

    def save() -> None:  # after each row: these runs are long
        if options.json:
            report = head | {"rows": rows} | ({"ranks": ranks} if ranks else {})
            options.json.write_text(json.dumps(report, indent=1))

    for row in _rows(options, list(rows), ranks, save):
        if options.claim == "progressive":
            rows[:] = [r for r in rows if place(r) != place(row)]
        rows.append(row)
        save()
    return 0


def _known(claim: str) -> tuple[str, ...]:
    """What --only may name."""
    if claim == "speed":
        from benchmarks.claims._low_rank_resnet import GROUPS

        return tuple(name for group in GROUPS for name in group)
    return {"progressive": (ONE, FADING, STAGES), "layers": ("stem",)}.get(claim, ())


def _rows(
    options: argparse.Namespace,
    done: list[dict[str, Any]],
    ranks: dict[str, dict[str, Any]],
    save: Callable[[], None],
) -> Iterable[dict[str, Any]]:
    from benchmarks.claims import (
        _low_rank_language,
        _low_rank_layers,
        _low_rank_parts,
        _low_rank_recovery,
        _low_rank_resnet,
        _low_rank_search,
        _low_rank_short,
    )

    if options.claim == "progressive":
        ratio = (options.ratios or [16.0])[0]
        if options.dense:
            options.dense.mkdir(parents=True, exist_ok=True)
        setup = _low_rank_recovery.Setup(
            width=options.width,
            layers=options.layers,
            steps=options.steps,
            batch=options.batch or 8,
            ratio=ratio,
            device=options.device,
            folder=str(options.dense or ""),
        )
        return _low_rank_recovery.progressive(
            setup,
            options.recovery,
            options.seeds,
            options.tuning,
            options.at_once,
            rates=options.rates,
            refine=options.refine,
            kinds=options.only or (ONE, FADING, STAGES),
            done=done,
        )
    if options.claim == "smollm":
        return _low_rank_language.smollm(tuple(options.ratios or (1.25, 1.5, 2.0)), options.device, options.windows)
    if options.claim == "layers":
        return _low_rank_layers.layers(options.batch or 256, options.plans, options.only == ["stem"])
    if options.claim == "parts":
        return _low_rank_parts.parts(options.batch or 256)
    if options.claim == "short":
        found = json.loads(options.ranks.read_text())["ranks"]
        return _low_rank_short.short(found, options.batch or 256)
    if options.claim == "search":
        return _low_rank_search.search(options.device)
    passes = [training for training, no in ((False, options.no_inference), (True, options.no_training)) if not no]
    return _low_rank_resnet.measure(
        options.depths,
        options.device,
        options.batch,
        passes=passes,
        rounds=options.rounds,
        ranks=ranks,
        save=save,
        only=options.only,
        done=[(row["model"], row["what"], row["variant"]) for row in done],
        at_once=options.at_once,
        warm=options.warm,
        ranks_only=options.ranks_only,
        profile=not options.no_profile,
    )


if __name__ == "__main__":
    sys.exit(main())
