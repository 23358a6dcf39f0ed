"""The CUDA kernel of the lowrank family against the reference, on a GPU.

`python tests/cuda/check_lowrank.py`. Every problem is run twice (the bits must agree) in memory filled with NaN; errors may be
at most twice those of the same-dtype PyTorch computation. `--sanitize` runs small problems under compute-sanitizer's memcheck,
and under its racecheck one problem a process. The table comes last; numbers go to $OUT/lowrank_check.json, if OUT is set.
Times: `benchmarks/ops/lowrank_cuda.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

os.environ["EFFCORE_LOWRANK_EVERYWHERE"] = "1"  # small shapes too

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))
import effcore  # noqa: E402

for folder in filter(None, os.environ.get("EFFCORE_LIBRARIES", "").split(":")):  # folders with lib/libeffcore_*.so
    effcore.__path__.append(folder)

from effcore.ops import lowrank as ops  # noqa: E402
from effcore.reference import lowrank as ref  # noqa: E402

NAMES = ("out", "dx", "ddown", "dup", "dbias")


def problem(rows: int, features: int, rank: int, out: int, dtype: torch.dtype) -> list[torch.Tensor]:
    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, device="cuda") * scale).to(dtype).requires_grad_()

    return [
        random(rows, features),
        random(rank, features, scale=features**-0.5),
        random(out, rank, scale=rank**-0.5),
        random(out),
    ]


def results(function, leaves: list[torch.Tensor], dout: torch.Tensor) -> list[torch.Tensor]:
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, dout.to(value.dtype))]


def check(small: bool, only: list[int] | None = None) -> list[tuple[str, bool]]:
    rows = []
    count = 0
    shapes = [
        (2048, 64, 8, 72),
        (2049, 136, 64, 128),
        (2100, 200, 100, 520),
        (4096, 768, 128, 3072),
        (5000, 768, 256, 3072),
        (4097, 1000, 192, 1544),
        (70000, 256, 64, 256),
    ]
    for dtype in (torch.bfloat16, torch.float16):
        for shape in shapes[:3] if small else shapes:
            for code, activation in enumerate(ops.ACTIVATIONS):
                count += 1
                if only is not None and count - 1 not in only:
                    continue
                leaves = problem(*shape, dtype)
                dout = torch.randn(shape[0], shape[3], device="cuda").to(dtype)
                torch.full((1 << 26,), float("nan"), device="cuda")  # into the allocator's free memory

                def ours(*t: torch.Tensor, code: int = code) -> torch.Tensor:
                    return torch.ops.effcore.lowrank_linear(*t, code)

                def plain(*t: torch.Tensor, activation: str | None = activation) -> torch.Tensor:
                    return ref.lowrank_linear(*t, activation=activation)

                got, again = results(ours, leaves, dout), results(ours, leaves, dout)
                same = results(plain, leaves, dout)
                exact = results(plain, [t.detach().double().requires_grad_() for t in leaves], dout.double())
                good = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
                worst = 0.0
                for a, b, c in zip(got, same, exact, strict=True):
                    floor = torch.finfo(dtype).eps * c.norm()
                    worst = max(worst, float((a.double() - c).norm() / (2 * (b.double() - c).norm() + floor)))
                rows.append(
                    (f"{dtype} {shape} {activation}: error {worst:.2f} of what is allowed", good and worst <= 1)
                )
    return rows


# Of the small problems: each shape plain, and one with an activation whose argument is kept; bfloat16.
RACES = [*(len(ops.ACTIVATIONS) * i for i in range(3)), 2 * len(ops.ACTIVATIONS) + 2]


def sanitized(tool: str, options: list[str]) -> bool:
    """Of this library's kernels alone: racecheck reports races in cuBLAS's."""
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", "--kernel-name=kernel_substring=lowrank"]
    return subprocess.run([*command, sys.executable, __file__, "--small", *options]).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = check(options.small, options.only)
    if options.sanitize:
        rows.append(("compute-sanitizer memcheck", sanitized("memcheck", [])))
        for index in RACES:
            rows.append(
                (f"compute-sanitizer racecheck, problem {index}", sanitized("racecheck", ["--only", str(index)]))
            )
    for what, good in rows:
        print("ok  " if good else "BAD ", what)
    if folder := os.environ.get("OUT"):
        report = {"device": torch.cuda.get_device_name(), "checks": rows}
        (Path(folder) / "lowrank_check.json").write_text(json.dumps(report, indent=1))
    return 0 if all(good for _, good in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
