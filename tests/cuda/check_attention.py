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
from tests.cuda.attention_runs import error, group, kv_group, row_of, sdpa_group, twice  # noqa: E402
from tests.cuda.attention_special import check_nan, check_special  # noqa: E402


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
                    for layers in (4, 9):
                        group(
                            ops,
                            q,
                            k,
                            (values * 3)[:layers],
                            (grads * 3)[:layers],
                            keep,
                            causal=True,
                            **visibility(case),
                        )
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


def why(row: dict) -> str:
    if row["passed"]:
        return ""
    errors = [f"{name}={ours:.1e}/{theirs:.1e}" for name, (ours, theirs) in row["errors"].items()]
    return " ".join([*([] if row["identical"] else ["NOT IDENTICAL"]), *errors, row.get("problem", "")])


if __name__ == "__main__":
    sys.exit(main())
