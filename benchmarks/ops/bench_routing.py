"""The routing family: selection, tokens there and back, the fused norm; forward alone, and with the gradients.

Bytes count each row that must be read and each that must be written, once. Lists of the peers are int64, as torch wants them,
and made outside the timed region where a case begins with lists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import effcore.ops.routing as ops
from benchmarks.case import CallCost, Candidate, Case, Floor, Inputs, Settings, Work, dtype_name

DTYPES = (torch.float32, torch.bfloat16)
KEEP = 0.45

Shape = tuple[int, int, int]  # batch, tokens, channels
# batch, heads, kv_heads, tokens, dim; the first is SkipViT's own
SCORES = [
    (256, 6, 6, 197, 64),
    (256, 6, 1, 197, 384),
    (256, 6, 6, 1024, 64),
    (64, 16, 16, 2048, 64),
    (64, 16, 16, 4096, 64),
]


def cases(settings: Settings) -> Iterator[Case]:
    # The floors are the project's.
    if settings.cuda:
        shapes, dtypes = [(256, 1024, 384), (64, 2048, 2048), (256, 197, 384), (256, 1024, 385)], (torch.bfloat16,)
    else:
        shapes, dtypes = [(8, 197, 384), (32, 197, 384), (1, 1024, 768)], DTYPES
    for shape in shapes[:1] if settings.quick else shapes:
        yield _partition(settings, shape)
        for dtype in dtypes:
            yield _trip(settings, shape, dtype, Floor(2.0 if settings.cuda else 1.5))
            yield _gather(settings, shape, dtype)
            yield _separate(settings, shape, dtype)
            yield _merge(settings, shape, dtype)
            yield _merge_residual(settings, shape, dtype)
            yield _trip_with_gradients(settings, shape, dtype)
            yield _norm(settings, shape, dtype)
    for batch, heads, kv_heads, tokens, dim in SCORES if settings.cuda else SCORES[:1]:
        batch = batch if settings.cuda else 32
        yield _scores(settings, batch, heads, kv_heads, tokens, dim, dtypes[0], Floor(3.0 if settings.cuda else 1.0))


def _name(what: str, shape: Shape, dtype: torch.dtype) -> str:
    return f"{what} {dtype_name(dtype)} B={shape[0]} N={shape[1]} C={shape[2]}"


def _bytes(shape: Shape, dtype: torch.dtype) -> int:
    return shape[0] * shape[1] * shape[2] * dtype.itemsize


def _keep(shape: Shape) -> int:
    return int(KEEP * shape[1])


def _inputs(settings: Settings, shape: Shape, dtype: torch.dtype, *, grad: bool = False) -> Inputs:
    """Rows, scores, and the partition of them as our lists and as positions in the flattened batch."""
    batch, tokens, _ = shape
    x = torch.randn(shape, device=settings.device).to(dtype).requires_grad_(grad)
    scores = torch.rand(batch, tokens, device=settings.device)
    kept, rest = ops.partition_tokens(scores, _keep(shape))
    offsets = torch.arange(batch, device=settings.device)[:, None] * tokens
    made = {"x": x, "scores": scores, "kept": kept, "rest": rest}
    return made | {"at_kept": (kept + offsets).flatten(), "at_rest": (rest + offsets).flatten()}


def _flat(x: Inputs) -> Tensor:
    return x["x"].reshape(-1, x["x"].shape[2])


def _wide(index: Tensor, x: Tensor) -> Tensor:
    return index.long()[..., None].expand(-1, -1, x.shape[2])


def _by_topk(scores: Tensor, keep: int) -> list[Tensor]:
    """The partition by two selections."""
    picks = [scores.topk(keep, 1), scores.topk(scores.shape[1] - keep, 1, largest=False)]
    return [pick.indices.sort(1).values for pick in picks]


def _by_nonzero(scores: Tensor, keep: int) -> list[Tensor]:
    """The partition by one selection and what it left."""
    kept = scores.topk(keep, 1).indices.sort(1).values
    left = torch.ones_like(scores, dtype=torch.bool).scatter_(1, kept, False)
    return [kept, left.nonzero()[:, 1].view(len(scores), -1)]


def _trip(settings: Settings, shape: Shape, dtype: torch.dtype, floor: Floor) -> Case:
    """Partition, separation and merge: what a block region of SkipViT costs besides its blocks."""
    batch, tokens, _ = shape
    keep = _keep(shape)

    def ours(x: Inputs):
        kept, rest = ops.partition_tokens(x["scores"], keep)
        a, b = ops.separate_tokens(x["x"], kept, rest)
        return [a, ops.merge_tokens(a, kept, b, rest)]

    def by_index(x: Inputs):
        offsets = torch.arange(batch, device=x["x"].device)[:, None] * tokens
        lists = [(index + offsets).flatten() for index in _by_topk(x["scores"], keep)]
        flat = _flat(x)
        parts = [flat.index_select(0, index) for index in lists]
        out = torch.empty_like(flat)
        for index, part in zip(lists, parts, strict=True):
            out.index_copy_(0, index, part)
        return [parts[0].view(batch, keep, -1), out.view_as(x["x"])]

    def by_gather(x: Inputs):
        lists = [_wide(index, x["x"]) for index in _by_topk(x["scores"], keep)]
        parts = [x["x"].gather(1, index) for index in lists]
        out = torch.empty_like(x["x"])
        for index, part in zip(lists, parts, strict=True):
            out.scatter_(1, index, part)
        return [parts[0], out]

    return Case(
        name=_name("partition, separate, merge", shape, dtype),
        inputs=lambda: _inputs(settings, shape, dtype),
        outputs=("kept rows", "merged"),
        ours=Candidate("effcore", ours),
        peers=(Candidate("topk, sort, index", by_index), Candidate("topk, sort, gather", by_gather)),
        exact=lambda x: [x["x"].double().gather(1, _wide(x["kept"], x["x"])), x["x"].double()],
        work=Work(bytes=4 * _bytes(shape, dtype)),
        floor=floor,
    )


def _partition(settings: Settings, shape: Shape) -> Case:
    """The selection alone, by distinct scores."""
    keep = _keep(shape)

    def inputs() -> Inputs:
        return {"scores": torch.rand(shape[:2], device=settings.device).argsort(1).float()}

    return Case(
        name=f"partition float32 B={shape[0]} N={shape[1]}",
        inputs=inputs,
        outputs=("kept", "rest"),
        ours=Candidate("effcore", lambda x: ops.partition_tokens(x["scores"], keep)),
        peers=(
            Candidate("topk, sort", lambda x: _by_topk(x["scores"], keep)),
            Candidate("topk, nonzero", lambda x: _by_nonzero(x["scores"], keep)),
        ),
        exact=lambda x: _by_topk(x["scores"].double(), keep),
        work=Work(bytes=2 * 4 * shape[0] * shape[1]),
        floor=Floor(2.0) if settings.cuda else None,
    )


def _gather(settings: Settings, shape: Shape, dtype: torch.dtype) -> Case:
    batch, channels = shape[0], shape[2]
    return Case(
        name=_name("gather", shape, dtype),
        inputs=lambda: _inputs(settings, shape, dtype),
        outputs=("kept",),
        ours=Candidate("effcore", lambda x: [ops.gather_tokens(x["x"], x["kept"])]),
        peers=(
            Candidate("index_select", lambda x: [_flat(x).index_select(0, x["at_kept"]).view(batch, -1, channels)]),
            Candidate("gather", lambda x: [x["x"].gather(1, _wide(x["kept"], x["x"]))]),
        ),
        exact=lambda x: [x["x"].double().gather(1, _wide(x["kept"], x["x"]))],
        work=Work(bytes=2 * _keep(shape) * batch * channels * dtype.itemsize),
    )


def _separate(settings: Settings, shape: Shape, dtype: torch.dtype) -> Case:
    batch, channels = shape[0], shape[2]

    def by_index(x: Inputs):
        return [_flat(x).index_select(0, x[at]).view(batch, -1, channels) for at in ("at_kept", "at_rest")]

    return Case(
        name=_name("separate", shape, dtype),
        inputs=lambda: _inputs(settings, shape, dtype),
        outputs=("kept", "rest"),
        ours=Candidate("effcore", lambda x: ops.separate_tokens(x["x"], x["kept"], x["rest"])),
        peers=(
            Candidate("index_select", by_index),
            Candidate("gather", lambda x: [x["x"].gather(1, _wide(x[i], x["x"])) for i in ("kept", "rest")]),
        ),
        exact=lambda x: [x["x"].double().gather(1, _wide(x[i], x["x"])) for i in ("kept", "rest")],
        work=Work(bytes=2 * _bytes(shape, dtype)),
    )


def _merge(settings: Settings, shape: Shape, dtype: torch.dtype) -> Case:
    channels = shape[2]

    def inputs() -> Inputs:
        made = _inputs(settings, shape, dtype)
        a, b = ops.separate_tokens(made["x"], made["kept"], made["rest"])
        return made | {"a": a, "b": b}

    def by_index(x: Inputs):
        out = torch.empty_like(_flat(x))
        for at, part in (("at_kept", "a"), ("at_rest", "b")):
            out.index_copy_(0, x[at], x[part].view(-1, channels))
        return [out.view_as(x["x"])]

    def by_scatter(x: Inputs):
        out = torch.empty_like(x["x"])
        return [out.scatter_(1, _wide(x["kept"], out), x["a"]).scatter_(1, _wide(x["rest"], out), x["b"])]

    return Case(
        name=_name("merge", shape, dtype),
        inputs=inputs,
        outputs=("merged",),
        ours=Candidate("effcore", lambda x: [ops.merge_tokens(x["a"], x["kept"], x["b"], x["rest"])]),
        peers=(Candidate("index_copy", by_index), Candidate("scatter", by_scatter)),
        exact=lambda x: [x["x"].double()],
        work=Work(bytes=2 * _bytes(shape, dtype)),
    )


def _merge_residual(settings: Settings, shape: Shape, dtype: torch.dtype) -> Case:
    """y = x + merge(a, b): the rows of three tensors read and of one written."""
    merge = _merge(settings, shape, dtype)

    def inputs() -> Inputs:
        made = merge.inputs()
        return made | {"residual": torch.randn(shape, device=settings.device).to(dtype)}

    def ours(x: Inputs):
        return [ops.merge_tokens(x["a"], x["kept"], x["b"], x["rest"], residual=x["residual"])]

    def added(peer: Candidate) -> Candidate:
        return Candidate(f"{peer.name}, add", lambda x: [peer.call(x)[0] + x["residual"]])

    return Case(
        name=_name("merge + residual", shape, dtype),
        inputs=inputs,
        outputs=("merged",),
        ours=Candidate("effcore", ours),
        peers=tuple(added(peer) for peer in merge.peers),
        exact=lambda x: [x["x"].double() + x["residual"].double()],
        work=Work(bytes=3 * _bytes(shape, dtype)),
    )


def _trip_with_gradients(settings: Settings, shape: Shape, dtype: torch.dtype) -> Case:
    """Separation and merge, and their gradient: four movements of all rows."""
    channels = shape[2]

    def inputs() -> Inputs:
        made = _inputs(settings, shape, dtype, grad=True)
        return made | {"dout": torch.randn(shape, device=settings.device).to(dtype)}

    def gradient(out: Tensor, x: Inputs):
        return [out, *torch.autograd.grad(out, x["x"], x["dout"])]

    def ours(x: Inputs):
        a, b = ops.separate_tokens(x["x"], x["kept"], x["rest"])
        return gradient(ops.merge_tokens(a, x["kept"], b, x["rest"]), x)

    def by_index(x: Inputs):
        flat = _flat(x)
        a, b = (flat.index_select(0, x[at]) for at in ("at_kept", "at_rest"))
        out = torch.cat([a, b]).new_empty(flat.shape).index_copy(0, x["at_kept"], a).index_copy(0, x["at_rest"], b)
        return gradient(out.view_as(x["x"]), x)

    def by_inverse(x: Inputs):
        """The pure-torch form with the fewest passes: concatenate, and select by the inverse permutation."""
        flat = _flat(x)
        order = torch.cat([x["at_kept"], x["at_rest"]])
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        a, b = (flat.index_select(0, x[at]) for at in ("at_kept", "at_rest"))
        return gradient(torch.cat([a, b]).index_select(0, inverse).view(-1, *x["x"].shape[1:2], channels), x)

    return Case(
        name=_name("separate, merge, both gradients", shape, dtype),
        inputs=inputs,
        outputs=("merged", "dx"),
        ours=Candidate("effcore", ours),
        peers=(Candidate("index_select, index_copy", by_index), Candidate("index_select, inverse", by_inverse)),
        exact=lambda x: [x["x"].detach().double(), x["dout"].double()],
        work=Work(bytes=8 * _bytes(shape, dtype)),
    )


def _norm(settings: Settings, shape: Shape, dtype: torch.dtype) -> Case:
    batch, _, channels = shape

    def inputs() -> Inputs:
        weight, bias = (torch.randn(channels, device=settings.device).to(dtype) for _ in range(2))
        return _inputs(settings, shape, dtype) | {"weight": weight, "bias": bias}

    def composed(x: Inputs, rows: Tensor):
        return [rows, F.layer_norm(rows, (channels,), x["weight"], x["bias"])]

    def exact(x: Inputs):
        rows = x["x"].double().gather(1, _wide(x["kept"], x["x"]))
        return [rows, F.layer_norm(rows, (channels,), x["weight"].double(), x["bias"].double())]

    def by_index(x: Inputs):
        return composed(x, _flat(x).index_select(0, x["at_kept"]).view(batch, -1, channels))

    return Case(
        name=_name("gather, layer norm", shape, dtype),
        inputs=inputs,
        outputs=("rows", "normed"),
        ours=Candidate("effcore", lambda x: ops.gather_layer_norm(x["x"], x["kept"], x["weight"], x["bias"])),
        peers=(
            Candidate("index_select, layer_norm", by_index),
            Candidate("gather, layer_norm", lambda x: composed(x, x["x"].gather(1, _wide(x["kept"], x["x"])))),
        ),
        exact=exact,
        work=Work(bytes=3 * _keep(shape) * batch * channels * dtype.itemsize),
    )


def _scores(
    settings: Settings, batch: int, heads: int, kv_heads: int, tokens: int, dim: int, dtype: torch.dtype, floor: Floor
) -> Case:
    """The class token's scores and the partition by them; the gate compares the lists."""
    keep = int(KEEP * tokens)

    def inputs() -> Inputs:
        # Scores far apart, so that every dtype's rounding gives one order.
        q = torch.randn(batch, kv_heads, 1, dim, device=settings.device)
        direction = F.normalize(q, dim=-1)
        spread = torch.rand(batch, tokens, device=settings.device).argsort(1).argsort(1)[:, None, :, None]
        k = direction * spread.float() / tokens * 40
        return {"q": q.repeat_interleave(heads // kv_heads, 1).to(dtype), "k": k.to(dtype)}

    def composed(x: Inputs, pick):
        scores = (x["q"] @ x["k"].mT * dim**-0.5).float().softmax(-1)[:, :, 0].mean(1)
        return pick(scores, keep)

    return Case(
        name=f"score, partition {dtype_name(dtype)} B={batch} H={heads}/{kv_heads} N={tokens} D={dim}",
        inputs=inputs,
        outputs=("kept", "rest"),
        ours=Candidate("effcore", lambda x: ops.score_partition(x["q"], x["k"], keep)),
        peers=(
            Candidate("softmax, topk, sort", lambda x: composed(x, _by_topk)),
            Candidate("softmax, topk, nonzero", lambda x: composed(x, _by_nonzero)),
        ),
        exact=lambda x: composed({name: t.double() for name, t in x.items()}, _by_topk),
        work=Work(bytes=batch * kv_heads * tokens * dim * dtype.itemsize),
        floor=floor,
    )


def calls(settings: Settings) -> Iterator[CallCost]:
    x = torch.randn(1, 8, 4, device=settings.device)
    kept, rest = ops.partition_tokens(torch.rand(1, 8, device=settings.device), 4)
    a, b = ops.separate_tokens(x, kept, rest)
    at = kept[0].long()
    yield CallCost("gather", lambda: ops.gather_tokens(x, kept), peers={"index_select": lambda: x.index_select(1, at)})
    yield CallCost("merge", lambda: ops.merge_tokens(a, kept, b, rest))
