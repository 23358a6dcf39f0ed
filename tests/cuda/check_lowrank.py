"""The CUDA kernel of the lowrank family against the reference, and its speed against two products of cuBLAS, on a GPU.

`EFFCORE_LOWRANK_FUSED=1 python tests/cuda/check_lowrank.py [--time]`. Every problem is run twice (the bits must agree) in
memory filled with NaN; errors may be at most twice those of the same-dtype PyTorch computation. `--sanitize` runs small
problems under compute-sanitizer (memcheck and racecheck). The tables come last; numbers go to $OUT/lowrank_check.json, if OUT
is set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

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


def check(small: bool) -> list[tuple[str, bool]]:
    rows = []
    shapes = [
        (2048, 64, 8, 72),
        (2049, 136, 64, 128),
        (2100, 200, 100, 520),
        (4096, 768, 128, 3072),
        (5000, 768, 256, 3072),
    ]
    for dtype in (torch.bfloat16, torch.float16):
        for shape in shapes[:3] if small else shapes:
            for code, activation in enumerate(ops.ACTIVATIONS):
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


def times() -> list[dict[str, float | str]]:
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    table: list[dict[str, float | str]] = []
    for features, rank, out in [(768, r, 3072) for r in (32, 64, 128, 192, 256)] + [
        (3072, 256, 768),
        (2048, 128, 5632),
    ]:
        for rows in (2048, 4096, 8192, 16384, 65536):
            leaves = [t.detach() for t in problem(rows, features, rank, out, torch.bfloat16)]
            dense = torch.randn(out, features, device="cuda", dtype=torch.bfloat16)
            x, down, up, bias = leaves
            ways = {
                "fused": lambda: torch.ops.effcore.lowrank_linear(x, down, up, bias, 0),  # noqa: B023
                "two": lambda: F.linear(F.linear(x, down), up, bias),  # noqa: B023
                "dense": lambda: F.linear(x, dense, bias),  # noqa: B023
            }
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(12):
                for name, call in ways.items():
                    flush.zero_()
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    call()
                    end.record()
                    end.synchronize()
                    taken[name].append(start.elapsed_time(end) * 1e3)
            row: dict[str, float | str] = {"shape": f"M={rows} {features}->{out} r={rank}"}
            table.append(row | {name: statistics.median(values[2:]) for name, values in taken.items()})
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = check(options.small)
    if options.sanitize:
        for tool in ("memcheck", "racecheck"):
            done = subprocess.run(
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--small"]
            )
            rows.append((f"compute-sanitizer {tool}", done.returncode == 0))
    for what, good in rows:
        print("ok  " if good else "BAD ", what)
    table = times() if options.time else []
    for row in table:
        print(f"{row['shape']:28} fused {row['fused']:8.1f} us  two {row['two']:8.1f}  dense {row['dense']:8.1f}  "
              f"{row['two'] / row['fused']:.2f}x two  {row['dense'] / row['fused']:.2f}x dense")  # type: ignore[operator]  # fmt: skip
    if folder := os.environ.get("OUT"):
        report = {"device": torch.cuda.get_device_name(), "checks": rows, "times": table}
        (Path(folder) / "lowrank_check.json").write_text(json.dumps(report, indent=1))
    return 0 if all(good for _, good in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
