"""The CUDA kernels of the attention family against effcore.reference, on a GPU: `make cuda-check`.

Every problem is run twice (the bits must agree) in memory filled with NaN, and compared with the reference in float64. Our
error may be at most twice that of SDPA in the same dtype on the same inputs. With `--sanitize` each kernel also runs once under
compute-sanitizer (memcheck and racecheck). That of CUDA 13.0 (2025.3) reports races at barriers which TMA completes, where
2026.4 (`pip install nvidia-cuda-sanitizer-api`) finds none: its release notes list them as false. The first on PATH is taken.
EFFCORE_CUDA_SHARED_KIB=99 tests the kernels of GPUs with less shared memory.
The table comes last; numbers go to $OUT/attention_check.json, if OUT is set.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]
from benchmarks.run import use_carried_libraries  # noqa: E402

use_carried_libraries()

from effcore.ops import attention as ops  # noqa: E402
from effcore.reference import attention as reference  # noqa: E402
from tests.cuda import checks  # noqa: E402
from tests.cuda.attention_problems import (  # noqa: E402
    DTYPES,
    FLOOR,
    Case,
    add_own,
    add_sink,
    backward_grid,
    grid,
    kv_grid,
    nan_grid,
    tensor,
    visibility,
)


def error(x: Tensor, exact: Tensor) -> float:
    if not torch.isfinite(x).all():
        return float("inf")
    # A result that cancels to nothing (the gradient of a softmax over one key) carries the rounding of terms of about one.
    return ((x.double() - exact).norm() / exact.norm().clamp_min(1e-2 * x.numel() ** 0.5)).item() if x.numel() else 0.0


def group(
    module, q: Tensor, k: Tensor, values: list[Tensor], grads: list[Tensor], keep: str, **options
) -> dict[str, Tensor]:
    """An owner and its consumers, forward and backward, in `module` (ours or the reference)."""
    if len(values) == 1 and keep == "lse":
        outs = [module.attention(q, k, values[0], **options)]
    else:
        out, scores = module.attention_with_scores(q, k, values[0], consumers=len(values) - 1, keep=keep, **options)
        outs = [out, *(module.attention_from_scores(s, v) for s, v in zip(scores, values[1:], strict=True))]
    gradients = torch.autograd.grad(outs, (q, k, *values), grads)
    named = {"out": outs[0], "dq": gradients[0], "dk": gradients[1], "dv": gradients[2]}
    if len(values) > 1:
        named |= {"out_n": outs[-1], "dv_n": gradients[-1]}
    return {name: x.detach() for name, x in named.items()}


def kv_group(module, queries: list[Tensor], k: Tensor, v: Tensor, grads: list[Tensor], **options) -> dict[str, Tensor]:
    """Layers with queries of their own on shared keys and values, forward and backward."""
    shared = module.share_kv(k, v)
    outs = [module.attention_shared_kv(q, shared, **options) for q in queries]
    gradients = torch.autograd.grad(outs, (k, v, *queries), grads)
    return {"out": outs[-1].detach()} | dict(
        zip(("dk", "dv", "dq", "dq_n"), (*gradients[:3], gradients[-1]), strict=True)
    )


def sdpa_group(
    q: Tensor, k: Tensor, values: list[Tensor], grads: list[Tensor], mask: Tensor, scale: float | None
) -> dict[str, Tensor]:
    """The same dtype's computation that the error rule compares with: a full attention for each layer."""
    heads = q.shape[1]
    q, k, *values = (
        t.detach().contiguous().requires_grad_() for t in (q, k, *values)
    )  # SDPA's kernels fail on odd strides
    grads = [g.contiguous() for g in grads]
    outs = [
        F.scaled_dot_product_attention(
            q, reference.repeat_kv(k, heads), reference.repeat_kv(v, heads), attn_mask=mask, scale=scale
        )
        for v in values
    ]
    gradients = torch.autograd.grad(outs, (q, k, *values), grads)
    return {
        name: x.nan_to_num()
        for name, x in zip(
            ("out", "dq", "dk", "dv", "out_n", "dv_n"), (outs[0], *gradients[:3], outs[-1], gradients[-1]), strict=True
        )
    }


def int32(*x: int) -> Tensor:
    return torch.tensor(x, device="cuda", dtype=torch.int32)


def twice(run: Callable[[], dict]) -> list[dict]:
    """Two runs, each in memory filled with NaN; their bits must agree."""
    runs = []
    for _ in range(2):
        checks.poison()
        runs.append(run())
    return runs


def check(case: Case, keep: str) -> dict:
    q, k = tensor(case, case.heads, case.queries, case.dim), tensor(case, case.kv_heads, case.keys, case.dim)
    values = [tensor(case, case.kv_heads, case.keys, case.value_dim) for _ in range(case.layers)]
    if case.sink:
        add_sink(case, q, k)
    if case.own:
        add_own(case, q, k)
    grads = [tensor(case, case.heads, case.queries, case.value_dim, False) for _ in range(case.layers)]
    seen = visibility(case)
    options = dict(causal=case.causal, scale=case.scale, **seen)
    runs = twice(lambda: group(ops, q, k, values, grads, keep, **options))
    exact_inputs = [t.detach().double().requires_grad_() for t in (q, k, *values)]
    exact = group(
        reference, exact_inputs[0], exact_inputs[1], exact_inputs[2:], [g.double() for g in grads], keep, **options
    )
    mask = reference.visible(case.batch, case.queries, case.keys, causal=case.causal, device=q.device, **seen)[:, None]
    theirs = sdpa_group(q, k, values, grads, mask, case.scale)
    row = {
        "case": case.name(),
        "keep": keep,
        "identical": all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0]),
        "errors": {},
    }
    worst = 0.0
    # P kept in 16 bits is rounded once more than SDPA's (which shows at D = 1, where little else is).
    floor = FLOOR[case.dtype] * (4 / 3 if keep == "probs" else 1)
    for name, x in runs[0].items():
        ours, peer = error(x, exact[name]), error(theirs[name], exact[name])
        row["errors"][name] = (ours, peer)
        worst = max(worst, ours / max(2 * peer, floor))
    return row | {"worst": worst, "passed": worst <= 1.0 and row["identical"]}


def check_kv(case: Case) -> dict:
    """The float32 sums of dK and dV over ``case.layers`` layers, against SDPA's 16-bit layers added up by autograd."""
    k, v = tensor(case, case.kv_heads, case.keys, case.dim), tensor(case, case.kv_heads, case.keys, case.value_dim)
    queries = [tensor(case, case.heads, case.queries, case.dim) for _ in range(case.layers)]
    grads = [tensor(case, case.heads, case.queries, case.value_dim, False) for _ in range(case.layers)]
    seen = visibility(case)
    options = dict(causal=case.causal, scale=case.scale, **seen)
    runs = twice(lambda: kv_group(ops, queries, k, v, grads, **options))
    doubles = [t.detach().double().requires_grad_() for t in (k, v, *queries)]
    exact = kv_group(reference, doubles[2:], *doubles[:2], [g.double() for g in grads], **options)
    mask = reference.visible(case.batch, case.queries, case.keys, causal=case.causal, device=k.device, **seen)[:, None]
    kk, vv, *qs = (t.detach().contiguous().requires_grad_() for t in (k, v, *queries))
    outs = [
        F.scaled_dot_product_attention(
            q,
            reference.repeat_kv(kk, case.heads),
            reference.repeat_kv(vv, case.heads),
            attn_mask=mask,
            scale=case.scale,
        )
        for q in qs
    ]
    theirs = torch.autograd.grad(outs, (kk, vv, *qs), [g.contiguous() for g in grads])
    peers = {"out": outs[-1].detach()} | dict(zip(("dk", "dv", "dq", "dq_n"), (*theirs[:3], theirs[-1]), strict=True))
    row = {
        "case": "kv " + case.name(),
        "keep": "",
        "identical": all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0]),
        "errors": {n: (error(x, exact[n]), error(peers[n].nan_to_num(), exact[n])) for n, x in runs[0].items()},
    }
    worst = max(ours / max(2 * peer, FLOOR[case.dtype]) for ours, peer in row["errors"].values())
    return row | {"worst": worst, "passed": worst <= 1.0 and row["identical"]}


def check_decode(case: Case) -> dict:
    q, k = tensor(case, case.heads, 1, case.dim, False), tensor(case, case.kv_heads, case.keys, case.dim, False)
    v, v2 = (tensor(case, case.kv_heads, case.keys, case.value_dim, False) for _ in range(2))
    lengths = torch.randint(0, case.keys + 1, (case.batch,), device="cuda", dtype=torch.int32)
    lengths[0] = case.keys
    first = (
        torch.randint(0, max(case.keys // 2, 1), (case.batch,), device="cuda", dtype=torch.int32)
        if case.first_key
        else None
    )

    def run() -> dict:
        plain = ops.decode_attention(q, k, v, lengths, scale=case.scale, first_key=first)
        out, probs = ops.decode_attention(q, k, v, lengths, scale=case.scale, first_key=first, return_probs=True)
        weights = probs.weights.float() * probs.scales.repeat_interleave(256, -1)[..., : case.keys]
        return {"out": out, "plain": plain, "from_probs": ops.decode_from_probs(probs, v2, lengths), "probs": weights}

    runs = twice(run)
    exact = {}
    exact["out"], shared = reference.decode_attention(
        *(t.double() for t in (q, k, v)), lengths, scale=case.scale, first_key=first, return_probs=True
    )
    exact |= {
        "plain": exact["out"],
        "from_probs": reference.decode_from_probs(shared, v2.double(), lengths),
        "probs": shared.probs[:, :, 0],
    }
    mask = reference.visible(case.batch, 1, case.keys, lengths=lengths, first_key=first, device=q.device)[:, None]
    q, kk, v1, v2 = (reference.repeat_kv(t, case.heads).contiguous() for t in (q, k, v, v2))
    peer_out, peer_from = (
        F.scaled_dot_product_attention(q, kk, x, attn_mask=mask, scale=case.scale).nan_to_num() for x in (v1, v2)
    )
    eps, floor = torch.finfo(DTYPES[case.dtype]).eps, FLOOR[case.dtype]
    row = {
        "case": "decode " + case.name(),
        "keep": "",
        "identical": all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0]),
        "errors": {},
    }
    worst = 0.0
    for name, peer in (("out", peer_out), ("plain", peer_out), ("from_probs", peer_from), ("probs", None)):
        ours = error(runs[0][name], exact[name])
        theirs = error(peer, exact[name]) if peer is not None else eps
        row["errors"][name] = (ours, theirs)
        worst = max(worst, ours / max(2 * theirs, floor))
    return row | {"worst": worst, "passed": worst <= 1.0 and row["identical"]}


def check_nan(case: Case, keep: str) -> dict:
    """What NaN in keys and values reaches: the rows that see it, but no row that sees no key; in padding, nothing."""
    nan, wrong = float("nan"), []

    def run(place: Callable[[Tensor, list[Tensor]], None], **options) -> dict[str, Tensor]:
        torch.manual_seed(0)
        q, k = tensor(case, case.heads, case.queries, case.dim), tensor(case, case.kv_heads, case.keys, case.dim)
        values = [tensor(case, case.kv_heads, case.keys, case.value_dim) for _ in range(case.layers)]
        grads = [tensor(case, case.heads, case.queries, case.value_dim, False) for _ in range(case.layers)]
        with torch.no_grad():
            place(k, values)
        checks.poison()
        return group(ops, q, k, values, grads, keep, **options)

    # Key 5 holds NaN. Blocks of rows of which some see no key, and others this one.
    few, queries = case.keys // 3, torch.arange(case.queries, device="cuda")[None].expand(case.batch, -1)
    mixed = {
        "causal, lengths": {"causal": True, "lengths": int32(case.keys - 90, few)},
        "first_key": {"first_key": ((queries >= 70) * case.keys).int()},
        "first_key behind lengths": {"lengths": int32(few, few), "first_key": queries.int()},
    }
    places = {
        "keys": lambda k, values: k[:, :, 5].fill_(nan),
        "values": lambda k, values: [v[:, :, 5].fill_(nan) for v in values],
    }
    for rows, options in mixed.items():
        seen = reference.visible(case.batch, case.queries, case.keys, device=queries.device, **options)
        blind, sees_nan = (x[:, None].expand(-1, case.heads, -1) for x in (~seen.any(-1), seen[..., 5]))
        for where, place in places.items():
            got = run(place, **options)
            for name in sorted(got.keys() & {"out", "out_n", "dq"}):
                if got[name][blind].ne(0).any():
                    wrong.append(f"{rows}: NaN in {where} reaches {name} of rows that see no key")
                if not got[name][sees_nan].isnan().all():
                    wrong.append(f"{rows}: NaN in {where} does not reach {name}")

    first_key, lengths = int32(3, 70), int32(few, case.keys - 9)
    keys = torch.arange(case.keys, device="cuda")
    padding = ((keys < first_key[:, None]) | (keys >= lengths[:, None]))[:, None, :, None]
    zeros, nans = (
        run(
            lambda k, values, x=x: [t.masked_fill_(padding, x) for t in (k, *values)],
            causal=case.layers != 3,
            first_key=first_key,
            lengths=lengths,
        )
        for x in (0.0, nan)
    )
    wrong += [f"NaN in padding reaches {name}" for name in zeros if not torch.equal(zeros[name], nans[name])]
    row = row_of(f"nan {case.name()}", not wrong) | {"keep": keep}
    return row | ({"problem": "; ".join(wrong[:6])} if wrong else {})


def check_special() -> list[dict]:
    """NaN and infinities, rows without keys, empty tensors, poisoned padding, far offsets, reused scores, refusals."""
    rows = []

    def add(name: str, passed: bool) -> None:
        rows.append(row_of(name, bool(passed)))

    bf16 = torch.bfloat16
    q, k, v = (torch.randn(2, 2, 200, 64, device="cuda", dtype=bf16) for _ in range(3))
    lengths = torch.tensor([0, 150], device="cuda", dtype=torch.int32)
    for t in (k, v):
        t[1, :, 150:] = float("nan")
        t[0] = float("nan")
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    out = ops.attention(*inputs, lengths=lengths)
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    add("padding full of NaN is never read", all(torch.isfinite(t).all() for t in (out, *grads)) and not out[0].any())
    add(
        "decode: padding full of NaN is never read",
        torch.isfinite(ops.decode_attention(q[:, :, :1], k, v, lengths)).all(),
    )
    k2 = torch.randn_like(k)
    k2[0, 1, 7] = float("nan")
    add("NaN propagates", torch.isnan(ops.attention(q, k2, torch.randn_like(v))[0, 1]).all())
    for dtype in DTYPES:
        q2, k2, v2 = (torch.randn(1, 2, 300, 64, device="cuda").to(DTYPES[dtype]) for _ in range(3))
        q2[..., 0], k2[..., 0] = 1.0, -torch.inf
        outs = [ops.attention(q2, k2, v2, causal=True)]
        for keep in ("lse", "probs"):
            outs += [ops.attention_from_scores(ops.attention_with_scores(q2, k2, v2, keep=keep)[1][0], v2)]
        decoded, probs = ops.decode_attention(q2[:, :, :1], k2, v2, int32(300), return_probs=True)
        outs += [decoded, ops.decode_from_probs(probs, v2, int32(300))]
        add(f"scores that are all -inf have no softmax {dtype}", all(x.isnan().all() for x in outs))
    for b, sq, sk in ((0, 5, 5), (2, 0, 5), (2, 5, 0)):
        inputs = [torch.randn(b, 2, s, 64, device="cuda", dtype=bf16, requires_grad=True) for s in (sq, sk, sk)]
        for keep in ("lse", "probs"):
            checks.poison()
            named = group(
                ops,
                inputs[0],
                inputs[1],
                [inputs[2], inputs[2]],
                [torch.zeros(b, 2, sq, 64, device="cuda", dtype=bf16)] * 2,
                keep,
                causal=True,
            )
            add(f"empty B{b} {sq}x{sk} {keep}", all(not x.any() for x in named.values()))
    far = torch.empty(2, 1, 40, (1 << 25) + 64, device="cuda", dtype=bf16)[
        ..., -64:
    ].normal_()  # rows 2^25 apart: offsets beyond 2^31
    x = [far.detach().requires_grad_(), far.contiguous().requires_grad_()]
    results = []
    for t in x:
        out = ops.attention(t, t, t, causal=True)
        results.append((out, *torch.autograd.grad(out, t, torch.ones_like(out))))
    add("offsets beyond 2^31", all(torch.equal(a, b) for a, b in zip(*results, strict=True)))
    del far, x, results
    q, k, v = (torch.randn(1, 2, 64, 64, device="cuda", dtype=bf16, requires_grad=True) for _ in range(3))
    out, (scores,) = ops.attention_with_scores(q, k, v, consumers=1, keep="lse")
    twice = ops.attention_from_scores(scores, v) + ops.attention_from_scores(scores, v)
    dq, dk = torch.autograd.grad((out + twice).sum(), (q, k))
    add("scores used twice give NaN", torch.isnan(dq).all() and torch.isnan(dk).all())
    checks.poison()
    _, (scores,) = ops.attention_with_scores(*(t.detach().float() for t in (q, k, v)), consumers=1, keep="probs")
    add("all of kept probabilities is written, with the room of their factors", torch.isfinite(scores.probs).all())
    try:
        ops.attention(*(t.double() for t in (q, k, v)))
        add("float64 is refused", False)
    except (RuntimeError, ValueError) as refusal:
        add("float64 is refused", "float64" in str(refusal))
    # Where Hopper's kernels do not serve, a consumer's backward takes no memory for dout times the factors of P's rows.
    wide = [torch.randn(1, 2, 2048, 256, device="cuda", dtype=bf16, requires_grad=True) for _ in range(4)]
    _, (scores,) = ops.attention_with_scores(*wide[:3], consumers=1, keep="probs", causal=True)
    consumed = ops.attention_from_scores(scores, wide[3])
    dout = torch.ones_like(consumed)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (dv,) = torch.autograd.grad(consumed, wide[3], dout)
    taken = torch.cuda.max_memory_allocated() - before - dv.nbytes
    add("a consumer's backward at head_dim 256 takes no workspace", taken < dout.nbytes // 2)
    del wide, scores, consumed, dout, dv
    # More layers than shared memory has room for, and one head's P and dS exceed what the backward takes for them: the values
    # come again with every block of queries. Each layer's gradients are those of a layer alone, whose kernel is another one.
    for dim, layers in ((64, 7), (128, 5)):
        far_q, far_k, *values = (
            torch.randn(1, 1, 24576, dim, device="cuda", dtype=bf16, requires_grad=True) for _ in range(2 + layers)
        )
        douts = [torch.randn_like(value) for value in values]
        runs = [group(ops, far_q, far_k, values, douts, "lse", causal=True) for _ in range(2)]
        alone = [
            torch.autograd.grad(ops.attention(far_q, far_k, value, causal=True), (far_q, far_k, value), dout)
            for value, dout in zip(values, douts, strict=True)
        ]
        exact = {"dq": sum(x[0].double() for x in alone), "dk": sum(x[1].double() for x in alone)}
        exact |= {"dv": alone[0][2].double(), "dv_n": alone[-1][2].double()}
        passed = all(error(runs[0][name], x) < 1e-2 for name, x in exact.items())
        identical = all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
        add(f"long rows, {layers} layers at head_dim {dim}: values come again", passed and identical)
        del far_q, far_k, values, douts, runs, alone, exact
    # Graph capture: no synchronisation, no allocation outside torch's allocator.
    static = [t.detach().clone() for t in (q, k, v)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        eager = torch.ops.effcore.attention(*static, None, None, True, None)
        torch.ops.effcore.attention_bwd(eager[0], *static, *eager, None, None, True, None, False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.effcore.attention(*static, None, None, True, None)
        captured_grads = torch.ops.effcore.attention_bwd(captured[0], *static, *captured, None, None, True, None, False)
    eager_grads = torch.ops.effcore.attention_bwd(eager[0], *static, *eager, None, None, True, None, False)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    add(
        "CUDA graph",
        all(torch.equal(a, b) for a, b in zip((captured[0], *captured_grads), (eager[0], *eager_grads), strict=True)),
    )
    return rows


def run_small() -> None:
    """Each kernel once, for compute-sanitizer: no comparison, no SDPA."""
    for dtype, dim in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp16", 64), ("fp32", 64)):
        for layout in ("head", "sliced"):
            case = Case(
                dtype=dtype,
                dim=dim,
                value_dim=dim,
                batch=1,
                heads=2,
                kv_heads=1,
                queries=150,
                keys=170,
                layers=3,
                lengths=True,
                first_key="query",
                layout=layout,
            )
            if layout == "sliced" and dim != 64:
                continue
            q, k = tensor(case, 2, 150, dim), tensor(case, 1, 170, dim)
            add_sink(dataclasses.replace(case, sink=60.0), q, k)  # some pieces of work are done again
            values, grads = (
                [tensor(case, 1, 170, dim) for _ in range(3)],
                [tensor(case, 2, 150, dim, False) for _ in range(3)],
            )
            for keep in ("lse", "probs"):
                group(ops, q, k, values, grads, keep, causal=True, **visibility(case))
            kv_group(ops, [q] * 2, k, values[0], grads[:2], causal=True, **visibility(case))
            # The backward holds the values of one layer, of a few and of many in other places.
            if layout == "head" and dim <= 128 and dtype != "fp32":
                group(ops, q, k, values[:1], grads[:1], "lse", causal=True, **visibility(case))
                for keep in ("lse", "probs"):
                    group(ops, q, k, values * 3, grads * 3, keep, causal=True, **visibility(case))
            lengths = torch.full((1,), 165, device="cuda", dtype=torch.int32)
            _, probs = ops.decode_attention(
                q[:, :, :1].detach(), k.detach(), values[0].detach(), lengths, return_probs=True
            )
            ops.decode_from_probs(probs, values[1].detach(), lengths)
    many = Case(
        batch=1, heads=280, kv_heads=140, queries=70, keys=70, dim=128, value_dim=128
    )  # more blocks than processors
    q, k = tensor(many, 280, 70, 128), tensor(many, 140, 70, 128)
    values, grads = (
        [tensor(many, 140, 70, 128) for _ in range(2)],
        [tensor(many, 280, 70, 128, False) for _ in range(2)],
    )
    group(ops, q, k, values, grads, "probs", causal=True)
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", action="store_true", help="run compute-sanitizer as well, beside the problems")
    parser.add_argument("--small", action="store_true", help="only run each kernel once (what the sanitizer runs)")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="problems whose name matches ('decode' begins decoding's)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.small:
        run_small()
        return 0
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's failures on unusual shapes poison the context
    sanitizers = checks.Sanitizers(__file__, "effcore") if args.sanitize else None
    cases, decode = grid()
    cases += backward_grid()
    rows = []

    def attempt(what: str, run: Callable[[], dict | list[dict]]) -> None:
        if not re.search(args.only, what):
            return
        try:
            result = run()
            rows.extend(result if isinstance(result, list) else [result])
        except Exception as problem:  # one failing problem must not hide the others
            rows.append(row_of(what, False) | {"problem": f"{type(problem).__name__}: {problem}"[:300]})

    for case in cases:
        for keep in ("lse", "probs"):
            attempt(case.name(), lambda case=case, keep=keep: check(case, keep))
    for case in kv_grid():
        attempt("kv " + case.name(), lambda case=case: check_kv(case))
    for case in decode:
        attempt("decode " + case.name(), lambda case=case: check_decode(case))
    for case in nan_grid():
        for keep in ("lse", "probs"):
            attempt("nan " + case.name(), lambda case=case, keep=keep: check_nan(case, keep))
    attempt("special", check_special)
    for dtype in DTYPES:
        group_rows = [r for r in rows if f"{dtype} B" in r["case"] and r["errors"]]
        ratios = [a / max(b, 1e-30) for r in group_rows for a, b in r["errors"].values() if b > 1e-7]
        if ratios:
            print(
                f"{dtype}: {len(group_rows)} problems, our error / SDPA's: "
                f"median {sorted(ratios)[len(ratios) // 2]:.2f}, maximum {max(ratios):.2f}"
            )
    results = [(f"{row['case']} {row['keep']}".strip(), row["passed"], why(row)) for row in rows]
    if sanitizers:
        results += sanitizers.results()
    return checks.finish("attention", results, rows=rows)


def row_of(what: str, passed: bool) -> dict:
    """A problem that has no errors to compare."""
    worst = 0.0 if passed else float("inf")
    return {"case": what, "keep": "", "identical": True, "errors": {}, "worst": worst, "passed": passed}


def why(row: dict) -> str:
    if row["passed"]:
        return ""
    errors = [f"{name}={ours:.1e}/{theirs:.1e}" for name, (ours, theirs) in row["errors"].items()]
    return " ".join([*([] if row["identical"] else ["NOT IDENTICAL"]), *errors, row.get("problem", "")])


if __name__ == "__main__":
    sys.exit(main())
