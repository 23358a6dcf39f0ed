"""The CUDA kernels of the scan family against effcore.reference, and their speed, on a GPU.

Every problem is run twice (the bits must agree) in memory filled with NaN; results and gradients may be at most twice as far
from the float64 result as the same-dtype PyTorch recurrence. `--sanitize` runs small problems under compute-sanitizer
(memcheck and racecheck). `--time` prints medians of CUDA events with the second-level cache flushed, beside two bounds: bytes,
and special functions: N + 3 a token and channel (the decay of each state, the softplus' exponential, the gate's and its
reciprocal; the logarithm is a polynomial), 16 a clock and multiprocessor, at the clock that a spinning kernel shows. mamba-ssm
is timed where its kernels are installed. Tables come last; numbers go to $OUT/scan_check.json, if OUT is set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]
from benchmarks.run import use_carried_libraries  # noqa: E402

use_carried_libraries()

from effcore.ops import scan as ops  # noqa: E402
from effcore.reference import scan as ref  # noqa: E402
from tests.cuda import scan_times  # noqa: E402
from tests.cuda.checks import Result, Sanitizers, finish, poison  # noqa: E402
from tests.support import assert_accurate  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def rows(batch: int, tokens: int, channels: int, dtype: torch.dtype, layout: str) -> Tensor:
    if layout == "sliced":  # padded rows, an odd offset
        return torch.randn(batch, tokens, channels + 3, device="cuda").to(dtype)[..., 1 : channels + 1]
    if layout == "token-major":
        return torch.randn(tokens, batch, channels, device="cuda").to(dtype).transpose(0, 1)
    return torch.randn(batch, tokens, channels, device="cuda").to(dtype)


def evaluate(call: Callable[[dict[str, Tensor]], Any], leaves: dict[str, Tensor], grads: list[Tensor]) -> list[Tensor]:
    leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
    outs = call(leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    gradients = torch.autograd.grad(outs, list(leaves.values()), [g.to(o) for g, o in zip(grads, outs, strict=True)])
    return [*outs, *gradients]


def without_gradients(call: Callable[[dict[str, Tensor]], Any], leaves: dict[str, Tensor]) -> list[Tensor]:
    """What a pass writes that keeps nothing for a backward, which may take other kernels."""
    poison()
    with torch.no_grad():
        outs = call(leaves)
    return list(outs) if isinstance(outs, tuple) else [outs]


def judge(
    name: str, call: Callable[[Any, dict[str, Tensor]], Any], leaves: dict[str, Tensor], grads: list[Tensor]
) -> Any:
    runs = []
    for _ in range(2):
        poison()
        try:
            runs.append([t.clone() for t in evaluate(lambda x: call(ops, x), leaves, grads)])
            runs[-1] += without_gradients(lambda x: call(ops, x), leaves)
            torch.cuda.synchronize()
        except RuntimeError as error:
            return name, False, f"{type(error).__name__}: {error}"[:600]
    if not all(torch.equal(a, b) for a, b in zip(*runs, strict=True)):
        return name, False, "two runs differ"
    same = evaluate(lambda x: call(ref, x), leaves, grads)
    exact_grads = [g.to(o.dtype).double() for g, o in zip(grads, runs[0], strict=False)]
    exact = evaluate(lambda x: call(ref, x), {n: t.double() for n, t in leaves.items()}, exact_grads)
    same, exact = same + same[: len(grads)], exact + exact[: len(grads)]
    outputs = [f"output {i}" for i in range(len(grads))]
    names = outputs + [f"d{n}" for n in leaves] + [f"{name} without gradients" for name in outputs]
    tokens = leaves["x"].shape[1]
    try:
        for what, a, b, c in zip(names, runs[0], same, exact, strict=True):
            assert_accurate(a, b, c, what=what, terms=8.0 * tokens**0.5)
    except AssertionError as error:
        return name, False, str(error)
    return name, True, ""


def scan_leaves(batch, tokens, channels, states, dtype, layout, parts, sequences) -> dict[str, Tensor]:
    leaves = {
        "x": rows(batch, tokens, channels, dtype, layout),
        "dt": rows(batch, tokens, channels, dtype, "plain"),
        "A": -torch.rand(channels, states, device="cuda") * 2,
        "B": rows(batch, tokens, states, dtype, layout),
        "C": rows(batch, tokens, states, dtype, layout),
    }
    if parts:
        leaves |= {
            "D": torch.randn(channels, device="cuda"),
            "z": rows(batch, tokens, channels, dtype, layout),
            "dt_bias": torch.randn(channels, device="cuda") - 1,
            "initial_state": torch.randn(sequences, channels, states, device="cuda"),
        }
    return leaves


# Sequences of about 2,048 channels that go over 2 threads a channel: 32 blocks each, up to two a multiprocessor.
HALVES = 2 * (torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132) // 32
# batch, tokens, channels, states; cuts of packed sequences. Up to 16 states: a channel over 8 threads, in three roles; from
# (2, 40, 2048) on in two, over 4 and 2 threads (float32: 4), and whole ones: in one pass and, from 1025 tokens on, in chunks.
PROBLEMS = [
    (1, 1, 1, 1, None),
    (2, 7, 5, 3, None),
    (1, 64, 128, 16, None),
    (2, 129, 130, 16, None),
    (1, 300, 40, 5, None),
    (3, 70, 33, 17, None),
    (1, 150, 70, 64, None),
    (1, 90, 20, 256, None),
    (1, 200, 64, 16, [0, 3, 3, 100, 199, 200]),
    (1, 90, 17, 40, [0, 90]),
    (2, 0, 8, 4, None),
    (2, 40, 2048, 16, None),
    (4, 40, 2048, 16, None),
    (1, 150, 2001, 13, [0, 40, 40, 120, 150]),
    (HALVES, 100, 2048, 16, None),
    (1, 150, 2001, 13, [0, 0, *(150 * i // (HALVES - 1) for i in range(1, HALVES))]),
    (17, 20, 2048, 16, None),
    (1, 1100, 70, 16, None),
    (1, 2200, 33, 9, [0, 930, 2200]),
    (4, 40, 2048, 64, None),
    (1, 90, 2001, 37, [0, 20, 20, 61, 90]),
]


LAYOUTS = (("plain", False), ("sliced", True), ("token-major", True))
LARGE = 1 << 17  # elements from which on --small leaves out what takes the same kernels for all sizes


def is_wanted(number: int, large: bool, kind: str, layout: str, small: bool) -> bool:
    """small: one layout by turns; one in two dtypes of what is large, which has kernels of its own."""
    if not small:
        return kind == "bf16" or layout == "sliced"
    if large:
        return kind != "fp16" and layout == "token-major"
    return kind == "bf16" and layout == LAYOUTS[number % 3][0]


def problems(
    small: bool,
) -> Iterator[tuple[str, Callable[[Any, dict[str, Tensor]], Any], dict[str, Tensor], list[Tensor]]]:
    for number, (batch, longest, channels, states, cuts) in enumerate(PROBLEMS):
        large = batch * longest * channels >= LARGE
        tokens = min(longest, 40) if small and large and cuts is None else longest
        for kind, dtype in DTYPES.items():
            for layout, parts in LAYOUTS:
                if not is_wanted(number, large, kind, layout, small):
                    continue
                torch.manual_seed(tokens)
                offsets = None if cuts is None else torch.tensor(cuts, dtype=torch.int32, device="cuda")
                sequences = batch if cuts is None else len(cuts) - 1
                leaves = scan_leaves(batch, tokens, channels, states, dtype, layout, parts, sequences)
                grads = [torch.randn(batch, tokens, channels, device="cuda")]
                grads.append(torch.randn(sequences, channels, states, device="cuda"))
                name = f"{kind} {layout} B={batch} L={tokens} E={channels} N={states} {cuts or ''}"

                def scan(module: Any, x: dict[str, Tensor], offsets=offsets) -> Any:
                    return module.selective_scan(**x, dt_softplus=True, return_final_state=True, offsets=offsets)

                if tokens:  # the reference of nothing has no graph
                    yield f"scan {name}", scan, leaves, grads
                if small and large:
                    continue
                for width in (2, 4, 8) if parts else (4,):
                    conv_leaves = {"x": leaves["x"], "weight": torch.randn(channels, width, device="cuda").to(dtype)}
                    if parts:
                        conv_leaves["bias"] = torch.randn(channels, device="cuda")
                        conv_leaves["initial_state"] = rows(sequences, width - 1, channels, dtype, "plain")

                    def conv(module: Any, x: dict[str, Tensor], offsets=offsets, silu=parts) -> Any:
                        return module.causal_conv1d(**x, activation="silu" if silu else None, offsets=offsets)

                    if tokens:
                        yield f"conv K={width} {name}", conv, conv_leaves, grads[:1]


def check_steps() -> list[Result]:
    results: list[Result] = []
    for kind, dtype in DTYPES.items():
        for batch, channels, states in ((1, 1, 1), (3, 130, 16), (2, 40, 5), (2, 33, 100), (1, 70, 256)):
            leaves = scan_leaves(batch, 1, channels, states, dtype, "plain", True, batch)
            one = {n: t[:, 0] if n in ("x", "dt", "B", "C", "z") else t for n, t in leaves.items()}
            state = one.pop("initial_state")
            ours = ops.selective_step(state, **one, dt_softplus=True)
            same = ref.selective_step(state, **one, dt_softplus=True)
            exact = ref.selective_step(state.double(), **{n: t.double() for n, t in one.items()}, dt_softplus=True)
            detail = ""
            try:
                for a, b, c in zip(ours, same, exact, strict=True):
                    assert_accurate(a, b, c, terms=4.0)
            except AssertionError as error:
                detail = str(error)
            results.append((f"step {kind} B={batch} E={channels} N={states}", not detail, detail))
    return results


def check_edges() -> list[Result]:
    """Nothing to do; huge and negative steps; offsets beyond 2^31; a captured graph."""
    results: list[Result] = []
    for batch, tokens, channels in ((0, 5, 8), (2, 0, 8), (2, 5, 0)):
        x = torch.randn(batch, tokens, channels, device="cuda", requires_grad=True)
        B = torch.randn(batch, tokens, 4, device="cuda", requires_grad=True)
        A = -torch.rand(channels, 4, device="cuda").requires_grad_()
        poison()
        out, final = ops.selective_scan(x, x, A, B, B, return_final_state=True)
        dA, dB = torch.autograd.grad(out.sum() + final.sum(), [A, B])
        good = not final.any() and not dA.any() and not dB.any()
        results.append((f"empty {batch} {tokens} {channels}", bool(good), ""))
    leaves = scan_leaves(1, 70, 40, 4, torch.float32, "plain", True, 1)
    leaves["dt"][0, 2, :8], leaves["dt"][0, 3, 8:16], leaves["dt"][0, 1, 16:24] = 6e4, -6e4, 1e-7
    results.append(judge("extreme steps", lambda m, x: m.selective_scan(**x, dt_softplus=True), leaves,
                         [torch.randn(1, 70, 40, device="cuda")]))  # fmt: skip
    for tokens, states in (
        (70, 16),
        (600, 16),
        (70, 40),
    ):  # what is not a number stays in its channel, and behind its token
        leaves = scan_leaves(2, tokens, 40, states, torch.bfloat16, "plain", True, 2)
        clean = ops.selective_scan(**leaves, dt_softplus=True)
        leaves["dt"][1, 33, 7] = float("nan")
        touched = torch.zeros_like(clean, dtype=torch.bool)
        touched[1, 33:, 7] = True
        out = ops.selective_scan(**leaves, dt_softplus=True)
        good = bool(out[touched].isnan().all()) and torch.equal(out[~touched], clean[~touched])
        results.append((f"NaN in dt, L={tokens} N={states}", good, ""))
    storage = torch.empty((2**31 + 2**20,), dtype=torch.bfloat16, device="cuda")
    big = storage.as_strided((2, 9, 16), (2**31 + 8, 16, 1))
    big.copy_(torch.randn(2, 9, 16))
    A, small = -torch.rand(16, 16, device="cuda"), big.clone()
    good = torch.equal(ops.selective_scan(big, big, A, big, big), ops.selective_scan(small, small, A, small, small))
    results.append(("offsets beyond 2^31", good, ""))
    del storage, big
    leaves = scan_leaves(1, 500, 64, 16, torch.bfloat16, "plain", True, 1)
    expected = ops.selective_scan(**leaves, dt_softplus=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.selective_scan(**leaves, dt_softplus=True)
    out.fill_(float("nan"))
    graph.replay()
    results.append(("CUDA graph", torch.equal(out, expected), ""))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitize", action="store_true", help="small problems under compute-sanitizer")
    parser.add_argument("--small", type=int, nargs=2, metavar=("PART", "PARTS"), help="every PARTS-th of few problems")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--no-check", action="store_true", help="times alone")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.small:  # what the sanitizer runs: our kernels alone
        part, parts = options.small
        for i, (_, call, leaves, grads) in enumerate(problems(True)):
            if i % parts != part:
                continue
            if leaves["x"].numel() < LARGE:
                evaluate(lambda x, call=call: call(ops, x), leaves, grads)
                without_gradients(lambda x, call=call: call(ops, x), leaves)
            else:
                call(ops, {n: t.detach().requires_grad_() for n, t in leaves.items()})  # keeps states for a backward
        torch.cuda.synchronize()
        return 0
    results: list[Result] = []
    checks = (lambda: [judge(*problem) for problem in problems(False)], check_steps, check_edges)
    for check in () if options.no_check else checks:
        try:
            results += check()
        except Exception as problem:  # one failing family of problems must not hide the others
            results.append(("check", False, f"{type(problem).__name__}: {problem}"[:600]))
    if options.sanitize:
        results += Sanitizers(__file__, "scan", [(str(part), "4") for part in range(4)]).results()
    return finish("scan", results, times=scan_times.report() if options.time else [])


if __name__ == "__main__":
    sys.exit(main())
