"""The CUDA kernels of the routing family against effcore.reference, and their speed against torch, on a GPU.

Every problem is run twice (the bits must agree) in memory filled with NaN. Movement must be exact; sums and norms may be at
most twice as far from the float64 result as the same-dtype PyTorch computation. `--sanitize` runs small problems under
compute-sanitizer (memcheck and racecheck), `--time` compares with the torch compositions (L2 flushed, medians of CUDA events,
alternating). The tables come last; numbers go to $OUT/routing_check.json, if OUT is set.
"""
# ruff: noqa: B023  (the lambdas are called before the loop goes on)

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))
import effcore  # noqa: E402

for folder in filter(None, os.environ.get("EFFCORE_LIBRARIES", "").split(":")):  # folders with lib/libeffcore_*.so
    effcore.__path__.append(folder)

from effcore.ops import routing as ops  # noqa: E402
from effcore.reference import routing as ref  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Results = list[tuple[str, bool, str]]


def poison() -> None:
    """Fills the caching allocator's free memory with NaN, so that what a kernel does not write is seen."""
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        return
    large = torch.full((1 << 26,), float("nan"), device="cuda")
    small = [torch.full((1 << 12,), float("nan"), device="cuda") for _ in range(128)]
    del large, small


def rows(batch: int, tokens: int, channels: int, dtype: torch.dtype, layout: str = "plain") -> Tensor:
    if layout == "sliced":  # padded rows, an odd offset
        return torch.randn(batch, tokens, channels + 3, device="cuda").to(dtype)[..., 1 : channels + 1]
    if layout == "token-major":
        return torch.randn(tokens, batch, channels, device="cuda").to(dtype).transpose(0, 1)
    if layout == "expanded":
        return torch.randn(1, tokens, channels, device="cuda").to(dtype).expand(batch, -1, -1)
    return torch.randn(batch, tokens, channels, device="cuda").to(dtype)


def partition_of(batch: int, tokens: int, keep: int) -> tuple[Tensor, Tensor]:
    order = torch.rand(batch, tokens, device="cuda").argsort(1).int()
    return order[:, :keep].sort(1).values, order[:, keep:].sort(1).values


def with_gradients(call, leaves: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in leaves]
    outs = call(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return [*outs, *torch.autograd.grad(outs, leaves, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)])]


def twice(call) -> tuple[list[Tensor], bool]:
    """The results in poisoned memory, and whether a second run gives the same bits."""
    poison()
    first = [t.clone() for t in call()]
    poison()
    second = call()
    same = all(
        torch.equal(
            a.contiguous().view(torch.uint8) if a.numel() else a, b.contiguous().view(torch.uint8) if b.numel() else b
        )
        for a, b in zip(first, second, strict=True)
    )
    return first, same


def accurate(got: Tensor, same: Tensor, exact: Tensor, terms: float = 0.0) -> str:
    """Empty, or what is wrong."""
    if got.shape != exact.shape or got.dtype != same.dtype:
        return f"{tuple(got.shape)} {got.dtype}"
    if not got.numel():
        return ""
    if not torch.isfinite(got).all():
        return "not finite"
    a, b = ((t.double() - exact.double()).abs().max().item() for t in (got, same))
    allowed = 2 * b + 2 * torch.finfo(got.dtype).eps * (exact.abs().max().item() + terms)
    return "" if a <= allowed else f"off by {a:.2e}, allowed {allowed:.2e}"


SHAPES = [
    (1, 1, 1, 1),
    (2, 7, 3, 5),
    (3, 197, 89, 384),
    (2, 64, 64, 64),
    (2, 64, 0, 64),
    (2, 130, 50, 385),
    (1, 300, 100, 2048),
    (2, 33, 16, 17),
    (2, 21, 10, 1000),
    (2, 9, 4, 5000),
    (3, 50, 20, 8),
    (2, 40, 13, 771),
]


def check_movement() -> Results:
    results: Results = []
    for (batch, tokens, keep, channels), dtype, layout in itertools.product(
        SHAPES, DTYPES, ("plain", "sliced", "token-major", "expanded")
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


def check_norms() -> Results:
    results: Results = []
    for (batch, tokens, keep, channels), dtype, rms, with_bias in itertools.product(
        SHAPES, DTYPES, (False, True), (False, True)
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


def check_partition() -> Results:
    results: Results = []
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
    shapes = [
        (2, 6, 6, 197, 64),
        (3, 6, 1, 197, 384),
        (1, 1, 1, 1, 1),
        (2, 12, 4, 50, 80),
        (2, 4, 4, 33, 33),
        (2, 3, 1, 600, 771),
        (1, 32, 8, 4096, 128),
        (1, 16, 1, 3000, 1024),
        (1, 8, 2, 20000, 64),
        (1, 9, 1, 12000, 2048),
    ]
    for (batch, heads, kv_heads, tokens, dim), dtype in itertools.product(shapes, DTYPES):
        q = torch.randn(batch, heads, 1, dim, device="cuda").to(DTYPES[dtype])
        k = torch.randn(batch, tokens, kv_heads, dim, device="cuda").to(DTYPES[dtype]).transpose(1, 2)
        keep = tokens // 2
        got, same = twice(lambda: [ops.class_scores(q, k), *ops.score_partition(q, k, keep, protect=min(1, keep))])
        wrong = accurate(got[0], ref.class_scores(q, k), ref.class_scores(q.double(), k.double()), 1e-2 / tokens)
        expected = ops.partition_tokens(got[0], keep, protect=min(1, keep))
        equal = all(torch.equal(a, b) for a, b in zip(got[1:], expected, strict=True))
        results.append(
            (f"scores {dtype} B{batch} H{heads}/{kv_heads} N{tokens} D{dim}", same and equal and not wrong, wrong)
        )
    return results


def check_special() -> Results:
    results: Results = []
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

    def forward():
        kept, rest = ops.score_partition(q, k, 89, protect=1)
        a, b = ops.separate_tokens(x, kept, rest)
        return [
            kept,
            ops.merge_tokens(a, kept, b, rest, residual=x),
            *ops.gather_layer_norm(x, kept, weight),
            torch.ops.effcore.gather_tokens_bwd(a, kept, 197),
        ]

    forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward()
    x.normal_(), k.normal_()
    graph.replay()
    torch.cuda.synchronize()
    results.append(("CUDA graph", all(torch.equal(a, b) for a, b in zip(captured, forward(), strict=True)), ""))
    return results


# ---------------------------------------------------------------- speed


def time_all(contenders: dict, rounds: int = 15) -> dict[str, float]:
    """Median milliseconds, alternating, behind a cold L2."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times: dict[str, list] = {name: [] for name in contenders}
    for call in contenders.values():
        call(), call()
    for _ in range(rounds):
        for name, call in contenders.items():
            flush.zero_()
            torch.cuda._sleep(400_000)  # the host gets ahead: launches are not what is measured
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            result = call()
            end.record()
            del result
            times[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in times.items()}


def speed(copy: float) -> list[dict]:
    table = []

    def row(what: str, moved: int, contenders: dict) -> None:
        ms = time_all(contenders)
        ours, best = ms["effcore"], min(t for n, t in ms.items() if n != "effcore")
        table.append(
            {
                "what": what,
                "us": {n: 1e3 * t for n, t in ms.items()},
                "ratio": best / ours,
                "tb_per_s": moved / ours / 1e9,
                "of_copy": moved / ours / 1e9 / copy,
            }
        )

    def topk(scores, keep):
        return scores.topk(keep, 1).indices.sort(1).values, scores.topk(
            scores.shape[1] - keep, 1, largest=False
        ).indices.sort(1).values

    def topk_mask(scores, keep):
        kept = scores.topk(keep, 1).indices.sort(1).values
        mask = torch.ones_like(scores, dtype=torch.bool).scatter_(1, kept, False)
        return kept, mask.nonzero()[:, 1].view(scores.shape[0], -1)

    for batch, tokens, channels, dtype in (
        (256, 1024, 384, torch.bfloat16),
        (64, 2048, 2048, torch.bfloat16),
        (256, 197, 384, torch.bfloat16),
        (256, 1024, 385, torch.bfloat16),
    ):
        x = rows(batch, tokens, channels, dtype)
        keep = int(0.45 * tokens)
        ia, ib = partition_of(batch, tokens, keep)
        offsets = torch.arange(batch, device="cuda")[:, None] * tokens
        fa, fb = (ia + offsets).flatten(), (ib + offsets).flatten()
        a, b = ops.separate_tokens(x, ia, ib)
        flat, row_bytes = x.view(-1, channels), channels * x.element_size()
        n, k = batch * tokens * row_bytes, batch * keep * row_bytes
        name = f"[{batch}x{tokens}, {channels}]"

        def index_copy(flat=flat, fa=fa, fb=fb, a=a, b=b, channels=channels):
            return (
                torch.empty_like(flat).index_copy_(0, fa, a.view(-1, channels)).index_copy_(0, fb, b.view(-1, channels))
            )

        row(
            f"gather 45 % {name}",
            2 * k,
            {
                "effcore": lambda: ops.gather_tokens(x, ia),
                "index_select": lambda: flat.index_select(0, fa),
                "gather": lambda: x.gather(1, ia.long()[..., None].expand(-1, -1, channels)),
            },
        )
        row(
            f"separate {name}",
            2 * n,
            {
                "effcore": lambda: ops.separate_tokens(x, ia, ib),
                "index_select x2": lambda: (flat.index_select(0, fa), flat.index_select(0, fb)),
            },
        )
        row(f"merge {name}", 2 * n, {"effcore": lambda: ops.merge_tokens(a, ia, b, ib), "index_copy x2": index_copy})
        row(
            f"separate + merge {name}",
            4 * n,
            {
                "effcore": lambda: ops.merge_tokens(
                    *(t for pair in zip(ops.separate_tokens(x, ia, ib), (ia, ib), strict=True) for t in pair)
                ),
                "index_select, index_copy": lambda: (flat.index_select(0, fa), flat.index_select(0, fb), index_copy()),
            },
        )
        row(
            f"merge + residual {name}",
            3 * n,
            {
                "effcore": lambda: ops.merge_tokens(a, ia, b, ib, residual=x),
                "index_copy x2, add": lambda: index_copy().view_as(x) + x,
            },
        )
        row(
            f"gather backward {name}",
            k + n,
            {
                "effcore": lambda: torch.ops.effcore.gather_tokens_bwd(a, ia, tokens),
                "zeros, index_copy": lambda: torch.zeros_like(flat).index_copy_(0, fa, a.view(-1, channels)),
                "index_add": lambda: torch.zeros_like(flat).index_add_(0, fa, a.view(-1, channels)),
            },
        )
        if channels % 2 == 0:
            weight, bias = (
                torch.randn(channels, device="cuda").to(dtype),
                torch.randn(channels, device="cuda").to(dtype),
            )
            norm = torch.nn.functional.layer_norm
            row(
                f"gather + layer norm {name}",
                3 * k,
                {
                    "effcore": lambda: ops.gather_layer_norm(x, ia, weight, bias),
                    "index_select, layer_norm": lambda: norm(flat.index_select(0, fa), (channels,), weight, bias),
                },
            )
            leaves = [x.detach().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
            ours = ops.gather_layer_norm(leaves[0], ia, *leaves[1:])
            rows_ = leaves[0].view(-1, channels).index_select(0, fa)
            theirs = (rows_, norm(rows_, (channels,), weight, bias))
            row(
                f"its backward {name}",
                5 * k + n,
                {
                    "effcore": lambda: torch.autograd.grad(ours, leaves, [a, a], retain_graph=True),
                    "torch": lambda: torch.autograd.grad(theirs, leaves, [a.view(-1, channels)] * 2, retain_graph=True),
                },
            )
        scores = torch.rand(batch, tokens, device="cuda")

        def there_and_back(scores=scores, x=x, keep=keep):
            kept, rest = ops.partition_tokens(scores, keep)
            a, b = ops.separate_tokens(x, kept, rest)
            return ops.merge_tokens(a, kept, b, rest)

        def composed_trip(pick, scores=scores, keep=keep, offsets=offsets, flat=flat):
            lists = [(index + offsets).flatten() for index in pick(scores, keep)]
            out = torch.empty_like(flat)
            for index in lists:
                out.index_copy_(0, index, flat.index_select(0, index))
            return out

        row(
            f"partition + separate + merge {name}",
            4 * n,
            {
                "effcore": there_and_back,
                "topk, sort x2, index": lambda: composed_trip(topk),
                "topk, sort, nonzero, index": lambda: composed_trip(topk_mask),
            },
        )
        torch.cuda.empty_cache()

    for batch, heads, kv_heads, tokens, dim in (
        (256, 6, 6, 197, 64),
        (256, 6, 1, 197, 384),
        (256, 6, 6, 1024, 64),
        (64, 16, 16, 2048, 64),
        (64, 16, 16, 4096, 64),
    ):
        scores = torch.rand(batch, tokens, device="cuda")
        q, k = (
            torch.randn(batch, heads, 1, dim, device="cuda").bfloat16(),
            torch.randn(batch, kv_heads, tokens, dim, device="cuda").bfloat16(),
        )
        keep = int(0.45 * tokens)
        if kv_heads > 1:
            row(
                f"partition [{batch}, {tokens}]",
                scores.nbytes * 2,
                {
                    "effcore": lambda: ops.partition_tokens(scores, keep, protect=1),
                    "topk, sort x2": lambda: topk(scores, keep),
                    "topk, sort, nonzero": lambda: topk_mask(scores, keep),
                },
            )

        def composed(pick, q=q, k=k, keep=keep):
            return pick((q @ k.mT * q.shape[-1] ** -0.5).float().softmax(-1)[:, :, 0].mean(1), keep)

        row(
            f"score + partition [{batch}, {heads}/{kv_heads}, {tokens}, {dim}]",
            k.nbytes,
            {
                "effcore": lambda: ops.score_partition(q, k, keep, protect=1),
                "softmax, topk, sort x2": lambda: composed(topk),
                "softmax, topk, sort, nonzero": lambda: composed(topk_mask),
            },
        )
    return table


def copy_bandwidth() -> float:
    a = torch.randint(0, 255, (1 << 30,), device="cuda", dtype=torch.uint8)
    b = torch.empty_like(a)
    return 2 * a.nbytes / time_all({"effcore": lambda: b.copy_(a)})["effcore"] / 1e9


# ---------------------------------------------------------------- command line


def run_small() -> None:
    """Each kernel on small problems, for compute-sanitizer."""
    global SHAPES
    SHAPES = [(2, 7, 3, 5), (2, 21, 10, 64), (2, 33, 16, 385)]
    check_movement(), check_norms()
    scores = torch.randn(2, 600, device="cuda")
    ops.partition_tokens(scores, 100, protect=1)
    for kv_heads, dim in ((4, 64), (1, 33)):
        ops.score_partition(
            torch.randn(2, 4, 1, dim, device="cuda"), torch.randn(2, kv_heads, 70, dim, device="cuda"), 30
        )
    x = rows(2, 20, 33, torch.bfloat16)
    ops.gather_tokens(x, torch.tensor([[0, 25, -3, 2**30]] * 2, device="cuda", dtype=torch.int32))
    torch.cuda.synchronize()


def sanitize(tool: str) -> tuple[str, bool, str]:
    command = [
        "compute-sanitizer",
        f"--tool={tool}",
        "--error-exitcode=9",
        "--kernel-name=kernel_substring=routing",
        sys.executable,
        __file__,
        "--small",
    ]
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    lines = [
        line for line in done.stdout.splitlines() if "ERROR" in line or "hazard" in line.lower() or "=========" in line
    ]
    return (
        tool,
        done.returncode == 0,
        "\n".join(lines[:20] + lines[-3:])
        + ("" if done.returncode in (0, 9) else done.stdout[-1500:] + done.stderr[-1500:]),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", action="store_true", help="run compute-sanitizer as well")
    parser.add_argument("--time", action="store_true", help="measure speed as well")
    parser.add_argument("--small", action="store_true", help="only run small problems (what the sanitizer runs)")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.small:
        run_small()
        return 0
    results: Results = []
    for check in (check_movement, check_norms, check_partition, check_special):
        try:
            results += check()
            torch.cuda.synchronize()
        except Exception as problem:  # one failing family of problems must not hide the others
            results.append((check.__name__, False, f"{type(problem).__name__}: {problem}"[:600]))
    report: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if args.time:
        report["copy_tb_per_s"] = copy = copy_bandwidth()
        report["speed"] = speed(copy)
    if args.sanitize:
        results += [sanitize(tool) for tool in ("memcheck", "racecheck")]
    report["results"] = results
    if out := os.environ.get("OUT"):
        Path(out, "routing_check.json").write_text(json.dumps(report, indent=1))
    failed = [r for r in results if not r[1]]
    for name, _, why in failed[:25]:
        print("FAILED", name, why[:400])
    for line in report.get("speed", []):
        times = "  ".join(f"{n} {t:.1f}" for n, t in line["us"].items())
        print(
            f"{line['what']:<46} {line['ratio']:5.2f}x  {line['tb_per_s']:.2f} TB/s = {line['of_copy']:.0%} of copy | "
            f"us: {times}"
        )
    print(
        f"{len(results)} problems, {len(failed)} failed, on {report['device']}, copy {report.get('copy_tb_per_s', 0):.2f} TB/s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
