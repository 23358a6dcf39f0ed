"""The CUDA kernel of the kronecker family against effcore.reference, and its speed against torch, on a GPU.

Every problem is run twice (the bits must agree) in memory filled with NaN, with NaN and infinities in the tokens of no group;
errors may be at most twice those of torch's products of the same dtype, expert by expert. `--sanitize` then runs small problems
under compute-sanitizer (memcheck and racecheck). Numbers go to $OUT/kronecker_check.json, if OUT is set.
Times come from `python -m benchmarks.run kronecker --device cuda`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]
from benchmarks.run import use_carried_libraries  # noqa: E402

use_carried_libraries()

from effcore.ops import kronecker as ops  # noqa: E402
from effcore.reference import kronecker as ref  # noqa: E402
from tests.cuda.checks import Result, Sanitizers, finish  # noqa: E402
from tests.support import assert_accurate, poisoned_memory  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("contiguous", "sliced", "padded")  # rows at odd places; rows at multiples of 16 bytes whatever their length
LOADS = ([5, 0, 70, 1], [0], [64, 64], [3000, 17, 0, 900], [9000, 0, 1200], [600, 0, 30])


def same_dtype(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """What torch computes from the same dtype with sums in float32: 16-bit products by the tensor cores, as ours are."""
    if x.dtype == torch.float32:
        return ref.grouped_gram(x, offsets)
    groups = [x[a:b].contiguous() for a, b in itertools.pairwise(offsets.tolist())]
    empty = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    return torch.stack([torch.mm(g.mT, g, out_dtype=torch.float32) if len(g) else empty for g in groups])


def check(loads: list[int], dim: int, dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    count = sum(loads) + 2
    width = {"contiguous": dim, "sliced": dim + 3, "padded": (dim + 15) // 8 * 8}[layout]
    first = 1 if layout == "sliced" else 0
    x = torch.randn(count, width, device="cuda").to(dtype)[:, first : first + dim]
    x[0], x[-1] = float("nan"), float("inf")  # in no group: must not be multiplied, not even by 0
    offsets = torch.tensor([1, *loads], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)
    with poisoned_memory():
        ours, again = ops.grouped_gram(x, offsets), ops.grouped_gram(x, offsets)
    assert torch.equal(ours, again), "two runs differ"
    assert torch.equal(ours, ours.mT), "not symmetric"
    same, exact = same_dtype(x, offsets), ref.grouped_gram(x.double(), offsets)
    # Tensor cores cut sums where others round them; torch takes other units where there are few features.
    terms = x[1:-1].double().square().sum().item() * max(1.0, 8 / dim)
    assert_accurate(ours, same, exact, terms=terms)
    out = same + same.mT
    before = out.double()
    result = ops.grouped_gram(x, offsets, alpha=0.5, beta=-0.25, out=out)
    assert result.data_ptr() == out.data_ptr()
    exact = 0.5 * exact - 0.25 * before
    assert_accurate(out, 0.5 * same - 0.25 * before.float(), exact, what="with previous sums", terms=terms)


def check_lowrank() -> None:
    """The GPU's own way to a basis: as much captured as by the best one, in two updates, the same bits twice."""
    torch.manual_seed(0)
    loads, dim, rank = [900, 0, 300, 5], 704, 10
    offsets = torch.tensor([0, *loads], device="cuda").cumsum(0, dtype=torch.int32)
    x = torch.randn(sum(loads), dim, device="cuda") * torch.arange(1, dim + 1, device="cuda").float().rsqrt()
    x = x @ torch.linalg.qr(torch.randn(dim, dim, device="cuda")).Q
    zeros = torch.zeros(len(loads), dim, rank, device="cuda"), torch.zeros(len(loads), device="cuda")
    once = ops.grouped_lowrank_update(*zeros, x, offsets)
    twice = ops.grouped_lowrank_update(*once, x, offsets)
    assert all(torch.equal(a, b) for a, b in zip(once, ops.grouped_lowrank_update(*zeros, x, offsets), strict=True))
    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        values = torch.linalg.svdvals(x[begin:end].double()).square()
        for count, (basis, discarded) in ((1, once), (2, twice)):
            captured, best = basis[e].double().square().sum(), count * values[:rank].sum()
            assert captured >= (1 - 1e-3) * best, f"expert {e}, update {count}: captured {captured / best:.6f}"
            torch.testing.assert_close(captured + discarded[e], count * values.sum(), rtol=1e-4, atol=1e-6)


def run_all(dims: tuple[int, ...], loads: tuple[list[int], ...], layouts: tuple[str, ...]) -> list[Result]:
    results: list[Result] = []
    for dim, load, dtype, layout in itertools.product(dims, loads, DTYPES, layouts):
        what = f"D={dim} loads={load} {dtype} {layout}"
        results.append(attempt(what, check, list(load), dim, dtype, layout))
    return results


def attempt(what: str, run: Callable[..., None], *arguments: Any) -> Result:
    try:
        run(*arguments)
    except Exception as error:  # one failing problem must not hide the others
        return what, False, f"{type(error).__name__}: {error}"
    return what, True, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="few and small problems (what the sanitizer runs)")
    parser.add_argument("--sanitize", action="store_true", help="small problems under compute-sanitizer too")
    options = parser.parse_args()
    if options.small:
        return 0 if all(r[1] for r in run_all((130, 264), (*LOADS[:1], *LOADS[-1:]), LAYOUTS[::2])) else 1
    results = run_all((1, 7, 8, 64, 128, 129, 136, 320, 704, 1408), LOADS, LAYOUTS)
    results.append(attempt("low-rank updates", check_lowrank))
    if options.sanitize:
        results += Sanitizers(__file__, "kronecker").results()
    return finish("kronecker", results)


if __name__ == "__main__":
    sys.exit(main())
