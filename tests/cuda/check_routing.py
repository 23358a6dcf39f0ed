"""The CUDA kernels of the routing family against effcore.reference, on a GPU: `make cuda-check`.

Every problem is run twice (the bits must agree) in memory filled with NaN. Movement must be exact; sums and norms may be at
most twice as far from the float64 result as the same-dtype PyTorch computation. `--sanitize` runs small problems under
compute-sanitizer (memcheck and racecheck). The table comes last; numbers go to $OUT/routing_check.json, if OUT is set.
"""
# ruff: noqa: B023  (the lambdas are called before the loop goes on)

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]
from benchmarks.run import use_carried_libraries  # noqa: E402

use_carried_libraries()

from effcore.ops import routing as ops  # noqa: E402
from effcore.reference import routing as ref  # noqa: E402
from tests.cuda.checks import Result, Sanitizers, finish  # noqa: E402
from tests.cuda.routing_problems import (  # noqa: E402
    DTYPES,
    SCORES,
    SHAPES,
    accurate,
    partition_of,
    rows,
    same_dtype_scores,
    twice,
    with_gradients,
)  # fmt: skip


def check_movement(shapes: list[tuple[int, ...]] = SHAPES) -> list[Result]:
    results: list[Result] = []
    for (batch, tokens, keep, channels), dtype, layout in itertools.product(
        shapes, DTYPES, ("plain", "sliced", "token-major", "expanded")
    ):
        kind = DTYPES[dtype]
        x = rows(batch, tokens, channels, kind, layout)
        ia, ib = partition_of(batch, tokens, keep)
        grads = [rows(batch, n, channels, kind, "sliced") for n in (keep, tokens - keep)]
        whole = rows(batch, tokens, channels, kind, layout)

        def both(module, x=x, ia=ia, ib=ib, grads=grads, whole=whole):
            a, b, dx = with_gradients(lambda x: module.separate_tokens(x, ia, ib), [x], grads)
            merged = with_gradients(lambda a, b: module.merge_tokens(a, ia, b, ib), [a, b], [whole])
            half = with_gradients(lambda x: module.gather_tokens(x, ia), [x], grads[:1])
            return [a, b, dx, *merged, *half]

        got, same = twice(lambda both=both: both(ops))
        equal = all(torch.equal(a, b) for a, b in zip(got, both(ref), strict=True))
        results.append(
            (
                f"move {dtype} {batch}x{tokens}/{keep} C{channels} {layout}",
                same and equal,
                "" if same else "not identical",
            )
        )
        residual, own = rows(batch, tokens, channels, kind, layout), rows(batch, keep, channels, kind)

        def residuals(module, cast=None, x=x, ia=ia, ib=ib, residual=residual, own=own):
            x, residual, own = (t if cast is None else t.to(cast) for t in (x, residual, own))
            a, b = ref.separate_tokens(x, ia, ib)
            return [
                module.merge_tokens(a, ia, b, ib, **named)
                for named in ({"residual": residual}, {"residual_a": own}, {"residual": residual, "residual_a": own})
            ]

        got, same = twice(lambda residuals=residuals: residuals(ops))
        wrong = [accurate(a, b, c) for a, b, c in zip(got, residuals(ref), residuals(ref, torch.float64), strict=True)]
        results.append(
            (f"residuals {dtype} {batch}x{tokens}/{keep} C{channels} {layout}", same and not any(wrong), str(wrong))
        )
    for dtype in DTYPES:  # any list, with repeats
        for channels in (64, 33):
            x, index = (
                rows(3, 20, channels, DTYPES[dtype]),
                torch.randint(0, 20, (3, 50), device="cuda", dtype=torch.int32),
            )
            grad = rows(3, 50, channels, DTYPES[dtype])
            got, same = twice(lambda: with_gradients(lambda x: ops.gather_tokens(x, index), [x], [grad]))
            a = with_gradients(lambda x: ref.gather_tokens(x, index), [x], [grad])
            b = with_gradients(lambda x: ref.gather_tokens(x, index), [x.double()], [grad.double()])
            wrong = accurate(got[1], a[1], b[1])
            results.append((f"repeats {dtype} C{channels}", same and torch.equal(got[0], a[0]) and not wrong, wrong))
    return results


def check_norms(shapes: list[tuple[int, ...]] = SHAPES) -> list[Result]:
    results: list[Result] = []
    for (batch, tokens, keep, channels), dtype, rms, with_bias in itertools.product(
        shapes, DTYPES, (False, True), (False, True)
    ):
        kind = DTYPES[dtype]
        if with_bias and rms:
            continue
        for repeats in (False, True):
            index = partition_of(batch, tokens, keep)[0]
            if repeats:
                index = torch.randint(0, tokens, (batch, keep), device="cuda", dtype=torch.int32)
            weight_kind = torch.float32 if with_bias else kind
            leaves = [
                rows(batch, tokens, channels, kind, "sliced" if channels == 64 else "plain"),
                torch.randn(channels, device="cuda").to(weight_kind),
            ]
            if with_bias:
                leaves.append(torch.randn(channels, device="cuda").to(weight_kind))
            grads = [rows(batch, keep, channels, kind) for _ in range(2)]

            def run(module, cast=None, index=index, leaves=leaves, grads=grads, rms=rms):
                call = module.gather_rms_norm if rms else module.gather_layer_norm
                to = [t if cast is None else t.to(cast) for t in leaves]
                return with_gradients(
                    lambda x, *w: call(x, index, *w, eps=1e-2), to, [g if cast is None else g.to(cast) for g in grads]
                )

            got, same = twice(lambda run=run: run(ops))
            terms = 30.0 * max(1.0, math.sqrt(batch * keep))
            wrong = [accurate(a, b, c, terms) for a, b, c in zip(got, run(ref), run(ref, torch.float64), strict=True)]
            results.append(
                (
                    f"norm {dtype} {batch}x{tokens}/{keep} C{channels} rms={rms} bias={with_bias} repeats={repeats}",
                    same and not any(wrong),
                    str(wrong),
                )
            )
    return results


def check_partition() -> list[Result]:
    results: list[Result] = []
    special = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-40], device="cuda")
    for tokens, dtype, kind in itertools.product(
        (1, 2, 31, 197, 512, 513, 1024, 4096, 30000), DTYPES, ("normal", "ties", "special")
    ):
        batch = 3
        scores = torch.randn(batch, tokens, device="cuda")
        if kind == "ties":
            scores = torch.randint(0, 3, (batch, tokens), device="cuda").float()
        if kind == "special":
            scores = special[torch.randint(0, len(special), (batch, tokens), device="cuda")]
        scores = scores.to(DTYPES[dtype])
        for keep, protect in {
            (0, 0),
            (tokens // 2, 0),
            (tokens // 2, min(1, tokens // 2)),
            (tokens, tokens),
            (min(5, tokens), min(4, tokens)),
        }:
            got, same = twice(lambda: ops.partition_tokens(scores, keep, protect=protect))
            expected = ref.partition_tokens(scores.cpu(), keep, protect=protect)
            equal = all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))
            results.append((f"partition {tokens} {dtype} {kind} keep={keep} protect={protect}", same and equal, ""))
    for (batch, heads, kv_heads, tokens, dim), dtype in itertools.product(SCORES, DTYPES):
        q = torch.randn(batch, heads, 1, dim, device="cuda").to(DTYPES[dtype])
        k = torch.randn(batch, tokens, kv_heads, dim, device="cuda").to(DTYPES[dtype]).transpose(1, 2)
        keep = tokens // 2
        got, same = twice(lambda: [ops.class_scores(q, k), *ops.score_partition(q, k, keep, protect=min(1, keep))])
        exact = ref.class_scores(q.double(), k.double())
        wrong = accurate(got[0], same_dtype_scores(q, k), exact, 1e-2 / tokens)
        if not wrong and (got[0] - exact).abs().max() > 2e-4 * exact.max():  # the products of 16-bit inputs are exact
            wrong = "not accumulated in float32"
        expected = ops.partition_tokens(got[0], keep, protect=min(1, keep))
        equal = all(torch.equal(a, b) for a, b in zip(got[1:], expected, strict=True))
        results.append(
            (f"scores {dtype} B{batch} H{heads}/{kv_heads} N{tokens} D{dim}", same and equal and not wrong, wrong)
        )
    return results


def check_special() -> list[Result]:
    results: list[Result] = []
    x = rows(2, 20, 33, torch.bfloat16)
    bad = torch.tensor([[0, 25, -3, 2**30, -(2**31)]] * 2, device="cuda", dtype=torch.int32)
    out = ops.gather_tokens(x.requires_grad_(), bad)
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    results.append(
        (
            "an index out of range touches nothing",
            torch.equal(out[:, 0], x[:, 0]) and not out[:, 1:].any() and dx[:, 1:].abs().sum().item() == 0,
            "",
        )
    )
    weight = torch.ones(33, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.autograd.grad(ops.gather_layer_norm(x, bad, weight)[1].sum(), (x, weight))
    ops.merge_tokens(x[:, :5].detach(), bad, x[:, 5:].detach(), torch.zeros(2, 15, device="cuda", dtype=torch.int32))
    for batch, tokens, dtype in ((3, 700, torch.float32), (100, 1024, torch.bfloat16)):
        q, k = (torch.randn(batch, 4, n, 64, device="cuda").to(dtype) for n in (1, tokens))
        k[0, 1, 333], k[1, 2, :, 0], q[1, 2, :, 0] = math.nan, -math.inf, 1.0
        results.append(
            (
                f"a NaN key, and a head of no finite scores, {tokens} tokens: NaN for the row, as in torch",
                all(
                    scores[:2].isnan().all() and not scores[2:].isnan().any()
                    for scores in (module.class_scores(q, k) for module in (ops, ref))
                ),
                "",
            )
        )
    os.environ["EFFCORE_DEBUG"] = "1"
    for name, call in (
        ("gather", lambda: ops.gather_tokens(x, bad)),
        ("merge", lambda: ops.merge_tokens(x[:, :5], bad, x[:, 5:], bad.repeat(1, 3))),
    ):
        try:
            call()
            results.append((f"EFFCORE_DEBUG refuses a bad index in {name}", False, ""))
        except ValueError as refusal:
            results.append((f"EFFCORE_DEBUG refuses a bad index in {name}", "effcore." in str(refusal), ""))
    del os.environ["EFFCORE_DEBUG"]
    try:
        ops.gather_tokens(x.double(), bad)
        results.append(("float64 is refused", False, ""))
    except (RuntimeError, ValueError) as refusal:
        results.append(("float64 is refused", "float64" in str(refusal), ""))
    for shape in ((0, 5, 8), (2, 0, 8), (2, 5, 0)):
        ia, ib = partition_of(shape[0], shape[1], shape[1] // 2)
        empty = torch.randn(shape, device="cuda", requires_grad=True)
        a, b = ops.separate_tokens(empty, ia, ib)
        merged = ops.merge_tokens(a, ia, b, ib)
        torch.autograd.grad(merged, empty, torch.ones_like(merged))
        results.append((f"empty {shape}", merged.shape == empty.shape, ""))
    far = torch.empty(3, 1 << 20, 1040, device="cuda", dtype=torch.bfloat16)[
        :, :: 1 << 15, 7:
    ].normal_()  # offsets beyond 2^31
    ia, ib = partition_of(3, far.shape[1], 10)
    results.append(
        (
            "offsets beyond 2^31",
            all(
                torch.equal(a, b)
                for a, b in zip(
                    ops.separate_tokens(far, ia, ib), ops.separate_tokens(far.contiguous(), ia, ib), strict=True
                )
            ),
            "",
        )
    )
    x, q, k = (
        rows(4, 197, 384, torch.bfloat16),
        rows(4, 6, 64, torch.bfloat16)[:, :, None],
        torch.randn(4, 6, 197, 64, device="cuda").bfloat16(),
    )
    weight = torch.randn(384, device="cuda").bfloat16()
    long = torch.randn(4, 6, 700, 64, device="cuda").bfloat16()  # in two launches

    def forward():
        kept, rest = ops.score_partition(q, k, 89, protect=1)
        a, b = ops.separate_tokens(x, kept, rest)
        return [
            kept,
            *ops.score_partition(q, long, 300),
            ops.merge_tokens(a, kept, b, rest, residual=x),
            *ops.gather_layer_norm(x, kept, weight),
            torch.ops.effcore.gather_tokens_bwd(a, kept, 197),
        ]

    forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward()
    x.normal_(), k.normal_(), long.normal_()
    graph.replay()
    torch.cuda.synchronize()
    results.append(("CUDA graph", all(torch.equal(a, b) for a, b in zip(captured, forward(), strict=True)), ""))
    return results


# ---------------------------------------------------------------- command line


def run_small() -> None:
    """Each kernel on small problems, for compute-sanitizer."""
    shapes = [(2, 7, 3, 5), (2, 21, 10, 64), (2, 33, 16, 385), (2, 9, 5, 768)]
    check_movement(shapes), check_norms(shapes)
    scores = torch.randn(2, 600, device="cuda")
    ops.partition_tokens(scores, 100, protect=1)
    for kv_heads, dim, dtype in itertools.product((4, 1), (64, 33), (torch.float32, torch.bfloat16)):
        q, k = (torch.randn(2, heads, n, dim, device="cuda").to(dtype) for heads, n in ((4, 1), (kv_heads, 300)))
        ops.score_partition(q, k, 30)  # 300 tokens of 2 rows: their heads are shared out
        ops.score_partition(q, k[:, :, :70], 30, protect=1)
    for heads in (2, 1):  # long rows, of two blocks and of one
        q, k = (torch.randn(192 // (heads + 1), heads, n, 64, device="cuda").bfloat16() for n in (1, 1030))
        ops.score_partition(q, k, 30), ops.class_scores(q, k)
    x = rows(2, 20, 33, torch.bfloat16)
    ops.gather_tokens(x, torch.tensor([[0, 25, -3, 2**30]] * 2, device="cuda", dtype=torch.int32))
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", action="store_true", help="run compute-sanitizer as well")
    parser.add_argument("--small", action="store_true", help="only run small problems (what the sanitizer runs)")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.small:
        run_small()
        return 0
    results: list[Result] = []
    for check in (check_movement, check_norms, check_partition, check_special):
        try:
            results += check()
            torch.cuda.synchronize()
        except Exception as problem:  # one failing family of problems must not hide the others
            results.append((check.__name__, False, f"{type(problem).__name__}: {problem}"[:600]))
    if args.sanitize:
        results += Sanitizers(__file__, "routing").results()
    return finish("routing", results)


if __name__ == "__main__":
    sys.exit(main())
