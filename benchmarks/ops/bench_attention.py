"""The attention family: one layer, a group that shares QK, a group that shares KV, decoding, and what calls cost.

FLOPs count the visible half of a causal layer, in products of 2 · pairs · D: forward 2, backward 5; a QK group of n layers
2n + (3n + 2) from the log-sum-exp and (n + 1) + (2n + 2) from kept probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import effcore.ops.attention as ops
from benchmarks.case import CallCost, Candidate, Case, Floor, Inputs, Settings, Work, dtype_name
from benchmarks.ops._attention import Attend, exact_attention, peers, softmax_scores

DTYPES = (torch.float32, torch.bfloat16)
LAYERS = 4  # of a sharing group

Shape = tuple[int, ...]  # (B, H, S, D), or (B, Hq, Hkv, S, D)


def cases(settings: Settings) -> Iterator[Case]:
    if settings.cuda:
        yield from _cuda_cases(settings)
        return
    # The floors are the project's: 2 cores, B=1 H=8 D=64, causal, S=512 to 4096.
    lengths = (512,) if settings.quick else (512, 1024, 2048, 4096)
    for tokens in lengths:
        shape: Shape = (1, 8, tokens, 64)
        yield _layer(settings, shape, torch.float32, Floor(1.2, "sdpa"))
        yield _layer(settings, shape, torch.float32, Floor(1.2, "sdpa"), backward=True)
        for keep in ("lse", "probs"):
            yield _qk_group(settings, shape, torch.float32, keep, Floor(1.6, "sdpa"))
        yield _kv_group(settings, shape, torch.float32)
    for tokens in lengths:
        shape = (1, 8, tokens, 64)
        yield _layer(settings, shape, torch.bfloat16, Floor(0.8, "sdpa"))
        yield _layer(settings, shape, torch.bfloat16, Floor(1.0, "sdpa"), backward=True)
    for tokens in lengths[1:2]:
        for keep in ("lse", "probs"):
            yield _qk_group(settings, (1, 8, tokens, 64), torch.bfloat16, keep)
    for dtype in DTYPES:
        for shape in ((1, 8, 8, 8192, 64), (4, 32, 8, 8192, 64))[: 1 if settings.quick else 2]:
            yield _decode(settings, shape, dtype, Floor(1.0, "sdpa"))
            yield _decode_from_probs(settings, shape, dtype, Floor(1.7, "effcore decode_attention"))


def _cuda_cases(settings: Settings) -> Iterator[Case]:
    shapes: list[Shape] = [(8, 16, 1024, 64), (2, 16, 4096, 64), (2, 16, 4096, 128), (1, 16, 16384, 128)]
    for shape in shapes[:1] if settings.quick else shapes:
        yield _layer(settings, shape, torch.bfloat16, Floor(0.5, "sdpa flash"))
        yield _layer(settings, shape, torch.bfloat16, Floor(0.5, "sdpa flash"), backward=True)
    for shape in shapes[:1] if settings.quick else shapes[1:3]:
        for keep in ("lse", "probs"):
            yield _qk_group(settings, shape, torch.bfloat16, keep)
        yield _kv_group(settings, shape, torch.bfloat16)
    for shape in ((32, 32, 8, 8192, 64), (32, 32, 8, 8192, 128))[: 1 if settings.quick else 2]:
        yield _decode(settings, shape, torch.bfloat16)
        yield _decode_from_probs(settings, shape, torch.bfloat16)


def _name(what: str, shape: Shape, dtype: torch.dtype) -> str:
    heads = f"H={shape[1]}" if len(shape) == 4 or shape[1] == shape[2] else f"H={shape[1]}/{shape[2]}"
    return f"{what} {dtype_name(dtype)} B={shape[0]} {heads} S={shape[-2]} D={shape[-1]}"


def _random(settings: Settings, *shape: int, dtype: torch.dtype, grad: bool = False) -> Tensor:
    return torch.randn(*shape, device=settings.device).to(dtype).requires_grad_(grad)


def _product(shape: Shape) -> float:
    """FLOPs of one matrix product over the visible half."""
    batch, heads, tokens, dim = shape
    return 2.0 * batch * heads * dim * tokens * (tokens + 1) / 2


# ---------------------------------------------------------------- one layer


def _layer(
    settings: Settings,
    shape: Shape,
    dtype: torch.dtype,
    floor: Floor | None = None,
    *,
    backward: bool = False,
) -> Case:
    def inputs() -> Inputs:
        made = {name: _random(settings, *shape, dtype=dtype, grad=backward) for name in "qkv"}
        return made | ({"dout": _random(settings, *shape, dtype=dtype)} if backward else {})

    def use(attend: Attend):
        def forward(x: Inputs):
            return [attend(x["q"], x["k"], x["v"])]

        def both(x: Inputs):
            out = attend(x["q"], x["k"], x["v"])
            return [out, *torch.autograd.grad(out, (x["q"], x["k"], x["v"]), x["dout"])]

        return both if backward else forward

    def exact(x: Inputs):
        outs, gradients = exact_attention(x["q"], x["k"], [x["v"]], [x["dout"]] if backward else [], causal=True)
        return outs + gradients

    what = "forward+backward" if backward else "forward"
    return Case(
        name=_name(what, shape, dtype),
        inputs=inputs,
        outputs=("out", "dq", "dk", "dv") if backward else ("out",),
        ours=Candidate("effcore", use(partial(ops.attention, causal=True))),
        peers=peers(settings, use, causal=True),
        exact=exact,
        work=Work(flops=(7 if backward else 2) * _product(shape), dtype=dtype_name(dtype)),
        floor=floor,
    )


# ---------------------------------------------------------------- groups of layers, forward and backward


def _qk_group(settings: Settings, shape: Shape, dtype: torch.dtype, keep: str, floor: Floor | None = None) -> Case:
    """n layers, one q and k, each layer its own v: against n whole attention calls, and against P computed once."""
    layers = range(LAYERS)

    def inputs() -> Inputs:
        made = {
            name: _random(settings, *shape, dtype=dtype, grad=True) for name in ("q", "k", *(f"v{i}" for i in layers))
        }
        return made | {f"dout{i}": _random(settings, *shape, dtype=dtype) for i in layers}

    def values(x: Inputs) -> list[Tensor]:
        return [x[f"v{i}"] for i in layers]

    def douts(x: Inputs) -> list[Tensor]:
        return [x[f"dout{i}"] for i in layers]

    def with_gradients(x: Inputs, outs: list[Tensor]) -> list[Tensor]:
        return [*outs, *torch.autograd.grad(outs, (x["q"], x["k"], *values(x)), douts(x))]

    def ours(x: Inputs):
        first, *rest = values(x)
        out, scores = ops.attention_with_scores(x["q"], x["k"], first, consumers=len(rest), keep=keep, causal=True)
        return with_gradients(x, [out, *(ops.attention_from_scores(s, v) for s, v in zip(scores, rest, strict=True))])

    def use(attend: Attend):
        return lambda x: with_gradients(x, [attend(x["q"], x["k"], v) for v in values(x)])

    def probs_once(q: Tensor, k: Tensor, *vs: Tensor) -> list[Tensor]:
        probs = softmax_scores(q, k, causal=True)
        return [probs @ v for v in vs]

    compiled = torch.compile(probs_once, dynamic=False)
    shared = Candidate("compiled eager, P once", lambda x: with_gradients(x, compiled(x["q"], x["k"], *values(x))))

    def exact(x: Inputs):
        outs, gradients = exact_attention(x["q"], x["k"], values(x), douts(x), causal=True)
        return outs + gradients

    n = LAYERS
    products = (2 * n + 3 * n + 2) if keep == "lse" else (n + 1 + 2 * n + 2)
    return Case(
        name=_name(f"QK group n={n} {keep}", shape, dtype),
        inputs=inputs,
        outputs=(*(f"out{i}" for i in layers), "dq", "dk", *(f"dv{i}" for i in layers)),
        ours=Candidate("effcore", ours),
        peers=peers(settings, use, causal=True, compiled=False) + ((shared,) if settings.compiled else ()),
        exact=exact,
        work=Work(flops=products * _product(shape), dtype=dtype_name(dtype)),
        floor=floor,
        note=_keep_note(settings, shape, dtype),
    )


def _keep_note(settings: Settings, shape: Shape, dtype: torch.dtype) -> str:
    """What ``keep="auto"`` takes for a group of this shape, and why."""
    q = torch.empty(1, dtype=dtype, device=settings.device).expand(shape)
    keep = ops.plan_keep(q, q, causal=True, consumers=LAYERS - 1)
    return f"keep={keep!r}: {ops.explain_keep(q, q, causal=True, consumers=LAYERS - 1)}"


def _kv_group(settings: Settings, shape: Shape, dtype: torch.dtype, floor: Floor | None = None) -> Case:
    """n layers, one k and v, each layer its own q."""
    layers = range(LAYERS)

    def inputs() -> Inputs:
        made = {
            name: _random(settings, *shape, dtype=dtype, grad=True) for name in ("k", "v", *(f"q{i}" for i in layers))
        }
        return made | {f"dout{i}": _random(settings, *shape, dtype=dtype) for i in layers}

    def queries(x: Inputs) -> list[Tensor]:
        return [x[f"q{i}"] for i in layers]

    def with_gradients(x: Inputs, outs: list[Tensor]) -> list[Tensor]:
        return [*outs, *torch.autograd.grad(outs, (x["k"], x["v"], *queries(x)), [x[f"dout{i}"] for i in layers])]

    def ours(x: Inputs):
        shared = ops.share_kv(x["k"], x["v"])
        return with_gradients(x, [ops.attention_shared_kv(q, shared, causal=True) for q in queries(x)])

    def use(attend: Attend):
        return lambda x: with_gradients(x, [attend(q, x["k"], x["v"]) for q in queries(x)])

    def exact(x: Inputs):
        parts = [exact_attention(x[f"q{i}"], x["k"], [x["v"]], [x[f"dout{i}"]], causal=True) for i in layers]
        dq, dk, dv = ([gradients[j] for _, gradients in parts] for j in range(3))
        return [*(outs[0] for outs, _ in parts), sum(dk), sum(dv), *dq]

    return Case(
        name=_name(f"KV group n={LAYERS}", shape, dtype),
        inputs=inputs,
        outputs=(*(f"out{i}" for i in layers), "dk", "dv", *(f"dq{i}" for i in layers)),
        ours=Candidate("effcore", ours),
        peers=peers(settings, use, causal=True, compiled=False),
        exact=exact,
        work=Work(flops=7 * LAYERS * _product(shape), dtype=dtype_name(dtype)),
        floor=floor,
    )


# ---------------------------------------------------------------- decoding: shape (B, Hq, Hkv, S, D)


def _cache(settings: Settings, shape: Shape, dtype: torch.dtype) -> Inputs:
    batch, heads, kv_heads, tokens, dim = shape
    made = {name: _random(settings, batch, kv_heads, tokens, dim, dtype=dtype) for name in "kvw"}
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=settings.device)
    return made | {"q": _random(settings, batch, heads, 1, dim, dtype=dtype), "lengths": lengths}


def _cache_bytes(shape: Shape, dtype: torch.dtype) -> float:
    batch, _, kv_heads, tokens, dim = shape
    return float(batch * kv_heads * tokens * dim * dtype.itemsize)


def _decoded(x: Inputs, values: str) -> list[Any]:
    return [ops.decode_attention(x["q"], x["k"], x[values], x["lengths"])]


def _decode(settings: Settings, shape: Shape, dtype: torch.dtype, floor: Floor | None = None) -> Case:
    """Every key is valid, so that SDPA needs no mask."""
    return Case(
        name=_name("decode_attention", shape, dtype),
        inputs=lambda: {name: t for name, t in _cache(settings, shape, dtype).items() if name != "w"},
        outputs=("out",),
        ours=Candidate("effcore", lambda x: _decoded(x, "v")),
        peers=peers(settings, lambda attend: lambda x: [attend(x["q"], x["k"], x["v"])], causal=False),
        exact=lambda x: exact_attention(x["q"], x["k"], [x["v"]], causal=False)[0],
        work=Work(bytes=2 * _cache_bytes(shape, dtype), dtype=dtype_name(dtype)),
        floor=floor,
    )


def _decode_from_probs(settings: Settings, shape: Shape, dtype: torch.dtype, floor: Floor | None = None) -> Case:
    """A consumer layer of a QK group: it has the owner's probabilities, and values ``w`` of its own."""

    def inputs() -> Inputs:
        made = _cache(settings, shape, dtype)
        _, probs = ops.decode_attention(made["q"], made["k"], made["v"], made["lengths"], return_probs=True)
        del made["v"]
        return made | {"weights": probs.weights, "scales": probs.scales}

    def ours(x: Inputs):
        return [ops.decode_from_probs(ops.DecodeProbs(x["weights"], x["scales"], None), x["w"], x["lengths"])]

    whole = Candidate("effcore decode_attention", lambda x: _decoded(x, "w"))
    others = peers(settings, lambda attend: lambda x: [attend(x["q"], x["k"], x["w"])], causal=False, compiled=False)
    probs_bytes = shape[0] * shape[1] * shape[3] * dtype.itemsize
    return Case(
        name=_name("decode_from_probs", shape, dtype),
        inputs=inputs,
        outputs=("out",),
        ours=Candidate("effcore", ours),
        peers=(*others, whole),
        exact=lambda x: exact_attention(x["q"], x["k"], [x["w"]], causal=False)[0],
        work=Work(bytes=_cache_bytes(shape, dtype) + probs_bytes, dtype=dtype_name(dtype)),
        floor=floor,
    )


# ---------------------------------------------------------------- what a call costs on the host


def calls(settings: Settings) -> Iterator[CallCost]:
    """One token of one head: the kernel costs about a microsecond, and it is counted as if it were overhead."""
    dtype = torch.bfloat16 if settings.cuda else torch.float32
    with torch.inference_mode():
        q, dout = (_random(settings, 1, 1, 1, 64, dtype=dtype) for _ in range(2))
        out, lse = torch.ops.effcore.attention.default(q, q, q, None, None, True, None)
        index = torch.zeros(1, dtype=torch.int64, device=settings.device)
    plain = q.clone()
    leaf = plain.clone().requires_grad_()
    gradient = dout.clone()
    op, op_backward = torch.ops.effcore.attention.default, torch.ops.effcore.attention_bwd.default

    def bare():
        return op(q, q, q, None, None, True, None)

    def bare_both():
        bare()
        return op_backward(dout, q, q, q, out, lse, None, None, True, None, False)

    def both(attend):
        return lambda: torch.autograd.grad(attend(), leaf, gradient)

    def sdpa(x):
        return lambda: scaled_dot_product_attention(x, x, x, is_causal=True)

    yield CallCost(
        "the op alone (inference mode)",
        bare,
        peers={"sdpa": sdpa(q), "index_select": lambda: torch.index_select(q, 0, index)},
        limit=10.0,
    )
    yield CallCost(
        "attention(), nothing to record",
        lambda: ops.attention(plain, plain, plain, causal=True),
        bare,
        {"sdpa": sdpa(plain)},
    )
    recorded = partial(ops.attention, leaf, leaf, leaf, causal=True)
    yield CallCost("attention(), recorded: autograd's share", recorded, bare, {"sdpa": sdpa(leaf)})
    yield CallCost("forward+backward: autograd's share", both(recorded), bare_both, {"sdpa": both(sdpa(leaf))})
