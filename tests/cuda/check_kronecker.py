"""The CUDA kernel of the kronecker family against effcore.reference, and its speed against torch, on a GPU.

Every problem is run twice (the bits must agree) in memory filled with NaN; errors may be at most twice those of float32
products, expert by expert. `--sanitize` runs small problems under compute-sanitizer (memcheck and racecheck). Times come from
`python -m benchmarks.run kronecker --device cuda`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]
import effcore  # noqa: E402

for folder in filter(None, os.environ.get("EFFCORE_LIBRARIES", "").split(":")):  # folders with lib/libeffcore_*.so
    effcore.__path__.append(folder)

from effcore.ops import kronecker as ops  # noqa: E402
from effcore.reference import kronecker as ref  # noqa: E402
from tests.support import assert_accurate, poisoned_memory  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOADS = ([5, 0, 70, 1], [0], [64, 64], [3000, 17, 0, 900], [9000, 0, 1200])


def check(loads: list[int], dim: int, dtype: torch.dtype, sliced: bool) -> None:
    torch.manual_seed(0)
    count = sum(loads) + 2
    x = torch.randn(count, dim + 3, device="cuda").to(dtype)[:, 1 : dim + 1] if sliced else None
    x = torch.randn(count, dim, device="cuda").to(dtype) if x is None else x
    offsets = torch.tensor([1, *loads], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)
    with poisoned_memory():
        ours, again = ops.grouped_gram(x, offsets), ops.grouped_gram(x, offsets)
    assert torch.equal(ours, again) and torch.equal(ours, ours.mT)
    same, exact = ref.grouped_gram(x, offsets), ref.grouped_gram(x.double(), offsets)
    assert_accurate(ours, same, exact, terms=x.double().square().sum().item())
    out = same + same.mT
    before = out.clone()
    ops.grouped_gram(x, offsets, alpha=0.5, beta=-0.25, out=out)
    exact = ref.grouped_gram(x.double(), offsets, alpha=0.5, beta=-0.25, out=before.double())
    assert_accurate(out, exact.float(), exact, terms=x.double().square().sum().item())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="few and small problems")
    parser.add_argument("--sanitize", action="store_true")
    options = parser.parse_args()
    if options.sanitize:
        env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for tool in ("memcheck", "racecheck"):
            command = [
                "compute-sanitizer",
                "--tool",
                tool,
                "--error-exitcode",
                "9",
                sys.executable,
                __file__,
                "--small",
            ]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            print(f"{tool}: exit {done.returncode}, {done.stdout.strip().splitlines()[-1:]}")
            if done.returncode:
                return 1
    dims = (1, 8, 130) if options.small else (1, 7, 8, 64, 128, 129, 136, 704, 1408)
    failed = checked = 0
    for dim, loads, dtype, sliced in itertools.product(
        dims, LOADS[:4] if options.small else LOADS, DTYPES, (False, True)
    ):
        checked += 1
        try:
            check(list(loads), dim, dtype, sliced)
        except AssertionError as error:
            failed += 1
            print(f"D={dim} loads={loads} {dtype} sliced={sliced}: {error}")
    print(f"{checked - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
