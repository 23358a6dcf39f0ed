"""The kronecker family: Gram matrices of experts' tokens, even loads and skewed ones.

Our work is the upper triangle; a peer that computes the whole product has twice as much to do. Peers return float32, as ours
does; on a GPU, where that is a pass of its own, also as they are without it, in the tokens' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

import effcore.ops.kronecker as ops
from benchmarks.case import CallCost, Candidate, Case, Floor, Inputs, Settings, Work, dtype_name

DTYPES = (torch.float32, torch.bfloat16)

Shape = tuple[int, int, int]  # experts, tokens, features


def cases(settings: Settings) -> Iterator[Case]:
    # The floors are the project's.
    dtypes = (torch.bfloat16,) if settings.cuda else DTYPES
    shapes = [(8, 8192, 1024), (60, 16384, 704), (16, 4096, 256)]
    if settings.cuda:
        shapes = [(60, 131072, 1408), (8, 32768, 4096)]
    for shape in shapes[:1] if settings.quick else shapes:
        for dtype in dtypes:
            yield _gram(settings, shape, dtype, skewed=False)
            yield _gram(settings, shape, dtype, skewed=True)


def _loads(shape: Shape, skewed: bool) -> list[int]:
    """Tokens of each expert: about equal, or half of them with one expert; the last expert has none."""
    experts, tokens, _ = shape
    first = tokens // 2 if skewed else 0
    shares = torch.rand(experts - 2 if skewed else experts - 1) + 0.5
    rest = (shares / shares.sum() * (tokens - first)).long().tolist()
    rest[-1] += tokens - first - sum(rest)
    return [first, *rest, 0] if skewed else [*rest, 0]


def _gram(settings: Settings, shape: Shape, dtype: torch.dtype, *, skewed: bool) -> Case:
    experts, tokens, features = shape
    loads = _loads(shape, skewed)
    ends = [0, *torch.tensor(loads).cumsum(0).tolist()]

    def inputs() -> Inputs:
        x = torch.randn(tokens, features, device=settings.device).to(dtype)
        return {"x": x, "offsets": torch.tensor(ends, dtype=torch.int32, device=settings.device)}

    def loop(x: Tensor) -> Tensor:
        return torch.stack([(x[a:b].mT @ x[a:b]).float() for a, b in pairwise(ends)])

    def into(x: Tensor) -> Tensor:
        """Without the copy of stack."""
        out = torch.empty(experts, features, features, dtype=x.dtype, device=x.device)
        for e, (a, b) in enumerate(pairwise(ends)):
            torch.mm(x[a:b].mT, x[a:b], out=out[e])
        return out

    def grouped(x: Inputs) -> Tensor:
        return torch._grouped_mm(x["x"].mT, x["x"], offs=x["offsets"][1:])

    peers = [
        Candidate("loop of mm", lambda x: [into(x["x"]).float()]),
        Candidate("loop, stack", lambda x: [loop(x["x"])]),
        Candidate("loop, float32", lambda x: [into(x["x"].float())]),
        Candidate("_grouped_mm", lambda x: [grouped(x).float()]),
    ]
    if dtype == torch.float32:
        peers = peers[:2]
    elif settings.cuda:
        peers += [
            Candidate("loop of mm, not cast", lambda x: [into(x["x"])]),
            Candidate("_grouped_mm, not cast", lambda x: [grouped(x)]),
        ]
    load = "half in one" if skewed else "even"
    against, ratio = ("_grouped_mm", 1.5 if skewed else 1.6) if settings.cuda else ("loop", 1.5)
    return Case(
        name=f"gram {dtype_name(dtype)} E={experts} T={tokens} D={features} {load}",
        inputs=inputs,
        outputs=("gram",),
        ours=Candidate("effcore", lambda x: [ops.grouped_gram(x["x"], x["offsets"])]),
        peers=tuple(peers),
        exact=lambda x: [torch.stack([x["x"][a:b].double().mT @ x["x"][a:b].double() for a, b in pairwise(ends)])],
        work=Work(flops=tokens * features * (features + 1.0), dtype=dtype_name(dtype)),
        floor=Floor(ratio, against),
    )


def calls(settings: Settings) -> Iterator[CallCost]:
    x = torch.randn(8, 4, device=settings.device)
    offsets = torch.tensor([0, 8], dtype=torch.int32, device=settings.device)
    yield CallCost("gram", lambda: ops.grouped_gram(x, offsets), peers={"mm": lambda: x.mT @ x})
