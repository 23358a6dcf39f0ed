"""SkipViT's claims: `python -m benchmarks.claims.skipvit speed | profile | accuracy`.

speed: ViT-S/16 at 224² in bfloat16 (float32 on the CPU), images a second of training and of inference, against the same model
compiled, with its fused attention. The paper: 1.132x at (0.55, 6, 10) on an Ascend 910A; our goal 1.17x; the ceiling, by FLOPs,
1.231x.

profile: the same, and where the time of a step goes, by kind of kernel (cuda).

accuracy: small ViTs on cluttered digits, equal steps, against no dropping, random dropping and merging of tokens (ToMe).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path = [str(ROOT), *sys.path, str(ROOT / "python")]  # an installed effcore, with its libraries, before the sources
from benchmarks.run import use_carried_libraries  # noqa: E402

use_carried_libraries()

from benchmarks.claims import _skipvit_speed  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.skipvit", description=__doc__)
    parser.add_argument("claim", choices=("speed", "profile", "accuracy"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--source", default="timm", choices=("timm", "hf"), help="whose ViT")
    parser.add_argument("--batch", type=int, help="images a step (default 256 on cuda, 8 on cpu; accuracy: 128)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile (speed, profile)")
    parser.add_argument("--kind", choices=("train", "infer"), help="only this (speed, profile)")
    parser.add_argument("--embedding", choices=tuple(_skipvit_speed.EMBEDDINGS), help="only this (speed, profile)")
    parser.add_argument("--only", type=int, help="only so many of the settings (speed, profile)")
    parser.add_argument("--steps", type=int, default=3000, help="training steps (accuracy)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (accuracy)")
    parser.add_argument("--method", action="append", help="only this, or these where given again (accuracy)")
    parser.add_argument("--picture", type=Path, help="draw which patches skipped, as PNG (accuracy)")
    parser.add_argument("--json", type=Path, help="write the numbers")
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    if options.claim == "profile" and not cuda:
        parser.error("profile needs a GPU")
    batch = options.batch or (128 if options.claim == "accuracy" else 256 if cuda else 8)
    machine = torch.cuda.get_device_name() if cuda else "cpu"
    report = {"claim": options.claim, "machine": machine, "torch": torch.__version__, "batch": batch}
    report["source"] = options.source
    if options.claim == "accuracy":
        report["steps"] = options.steps

    def keep(rows: list[dict]) -> None:  # after each finished measurement: a run that is cut off loses nothing
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")

    embeddings = (options.embedding,) if options.embedding else tuple(_skipvit_speed.EMBEDDINGS)
    if options.claim in ("speed", "profile"):
        _skipvit_speed.measure(
            options.source,
            options.device,
            batch=batch,
            compiled=not options.eager,
            settings=_skipvit_speed.SETTINGS[: options.only],
            embeddings=embeddings,
            kinds=(options.kind,) if options.kind else ("infer", "train"),
            kernels=options.claim == "profile",
            keep=keep,
            **({} if cuda else {"rounds": 5, "repeats": {"infer": 1, "train": 1}}),
        )
    else:
        from benchmarks.claims import _skipvit_accuracy

        methods = options.method or list(_skipvit_accuracy.METHODS)
        if unknown := set(methods) - set(_skipvit_accuracy.METHODS):
            parser.error(f"--method is one of {', '.join(_skipvit_accuracy.METHODS)}; got {', '.join(unknown)}")
        _skipvit_accuracy.measure(
            options.source, options.device, options.steps, options.seeds, batch, options.picture, methods, keep
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
