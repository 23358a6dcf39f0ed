"""What check_attention.py checks besides numbers: where NaN gets to, rows and tensors without anything, reuse, refusals."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effcore.ops import attention as ops
from effcore.reference import attention as reference
from tests.cuda import checks
from tests.cuda.attention_problems import DTYPES, Case, tensor
from tests.cuda.attention_runs import error, group, int32, row_of


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
