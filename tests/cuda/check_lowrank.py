"""The CUDA kernel of the lowrank family against the reference, on a GPU.

`python tests/cuda/check_lowrank.py`. Every problem is run twice (the bits must agree) in memory filled with NaN; errors may be
at most twice those of the same-dtype PyTorch computation. `--sanitize` runs small problems under compute-sanitizer's memcheck,
and under its racecheck one problem a process. The table comes last; numbers go to $OUT/lowrank_check.json, if OUT is set.
Times: `benchmarks/ops/lowrank_cuda.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

os.environ["EFFCORE_LOWRANK_EVERYWHERE"] = "1"  # small shapes too

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]
from benchmarks.run import use_carried_libraries  # noqa: E402

use_carried_libraries()

from effcore.ops import lowrank as ops  # noqa: E402
from effcore.reference import lowrank as ref  # noqa: E402
from tests.cuda.checks import TOOLS, Result, Sanitizers, finish, poison  # noqa: E402

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


def check(small: bool, only: list[int] | None = None) -> list[Result]:
    rows: list[Result] = []
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
                poison()

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
                what = f"{dtype} {shape} {activation}"
                rows.append((what, good and worst <= 1, f"error {worst:.2f} of what is allowed"))
    return rows


# Of the small problems: each shape plain, and one with an activation whose argument is kept; bfloat16.
RACES = [*(len(ops.ACTIVATIONS) * i for i in range(3)), 2 * len(ops.ACTIVATIONS) + 2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = check(options.small, options.only)
    if options.small:
        return 0 if all(good for _, good, _ in rows) else 1
    if options.sanitize:  # racecheck is slow: a process a problem
        races = [("--only", str(index)) for index in RACES]
        runs = [Sanitizers(__file__, "lowrank", tools=TOOLS[:1]), Sanitizers(__file__, "lowrank", races, TOOLS[1:])]
        rows += [row for run in runs for row in run.results()]
    return finish("lowrank", rows)


if __name__ == "__main__":
    sys.exit(main())
