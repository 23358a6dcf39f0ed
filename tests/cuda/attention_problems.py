"""The problems that check_attention.py runs: shapes, layouts, masks and dtypes, and their random tensors."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

# What is allowed where SDPA happens to be (nearly) exact: less than one rounding, or a few where exp2 itself has two
# units of error.
FLOOR = {"bf16": 0.75 * 2**-7, "fp16": 0.75 * 2**-10, "fp32": 6 * 2**-23}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Case:
    dtype: str = "bf16"
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    queries: int = 130
    keys: int = 130
    dim: int = 64
    value_dim: int = 64
    causal: bool = True
    lengths: bool = False
    first_key: str = ""  # "row": [B]; "query": a window of keys, [B, Sq]
    layout: str = "head"  # head, token, sliced (odd offset and stride)
    layers: int = 2
    scale: float | None = None
    sink: float = 0.0  # what half of the queries of half of the heads score a far key with
    own: float = 0.0  # how far a row's own key is above the others

    def name(self) -> str:
        marks = [
            self.dtype,
            f"B{self.batch} H{self.heads}/{self.kv_heads} {self.queries}x{self.keys}",
            f"D{self.dim}/{self.value_dim} n{self.layers}",
        ]
        marks += [m for m, on in (("causal", self.causal), ("lengths", self.lengths)) if on]
        marks += [f"first_key/{self.first_key}"] if self.first_key else []
        marks += [self.layout] if self.layout != "head" else []
        marks += [f"scale={self.scale}"] if self.scale is not None else []
        marks += [f"sink={self.sink:g}"] if self.sink else []
        marks += [f"own={self.own:g}"] if self.own else []
        return " ".join(marks)


def tensor(case: Case, heads: int, tokens: int, dim: int, requires_grad: bool = True) -> Tensor:
    dtype = DTYPES[case.dtype]
    if case.layout == "token":
        x = torch.randn(case.batch, tokens, heads, dim, device="cuda").to(dtype).transpose(1, 2)
    elif case.layout == "sliced":
        x = torch.randn(case.batch, heads, tokens, dim + 3, device="cuda").to(dtype)[..., 1 : dim + 1]
    else:
        x = torch.randn(case.batch, heads, tokens, dim, device="cuda").to(dtype)
    return x.requires_grad_(requires_grad)


def add_sink(case: Case, q: Tensor, k: Tensor) -> None:
    """A row's scores of its nearest keys say nothing of the score of a far one."""
    with torch.no_grad():
        q[..., 0] = 0.0
        q[:, ::2, ::2, 0] = 8.0
        k[:, :, 5, 0] = case.sink * case.dim**0.5 / 8


def add_own(case: Case, q: Tensor, k: Tensor) -> None:
    """What is small beside the score of a row's own key counts where there are many of it."""
    with torch.no_grad():
        q *= (case.own / case.dim**0.5) ** 0.5
        k.copy_(q[:, :: case.heads // case.kv_heads])


def visibility(case: Case) -> dict[str, Tensor | None]:
    lengths = torch.randint(0, case.keys + 1, (case.batch,), device="cuda", dtype=torch.int32) if case.lengths else None
    if case.lengths and case.batch > 1:
        lengths[0] = case.keys
    first = None
    if case.first_key == "row":
        first = torch.randint(0, max(case.keys // 2, 1), (case.batch,), device="cuda", dtype=torch.int32)
    elif case.first_key == "query":
        end = torch.arange(case.queries, device="cuda") + case.keys - case.queries
        first = (end - 40).clamp(0, case.keys).to(torch.int32)[None].expand(case.batch, -1)
    return {"lengths": lengths, "first_key": first}


def grid() -> tuple[list[Case], list[Case]]:
    base = Case()
    change = dataclasses.replace
    cases = []
    for dtype in DTYPES:
        for dim, value_dim in ((64, 64), (128, 128), (256, 256), (1, 3), (40, 72), (80, 64), (96, 192), (33, 128)):
            cases.append(change(base, dtype=dtype, dim=dim, value_dim=value_dim))
        cases += [
            change(base, dtype=dtype, causal=False, queries=1, keys=300),
            change(base, dtype=dtype, queries=300, keys=77),  # rows that see nothing
            change(base, dtype=dtype, queries=65, keys=500, heads=6, kv_heads=2, dim=128, value_dim=128),
            change(base, dtype=dtype, heads=6, kv_heads=2, lengths=True, queries=257, keys=257),
            change(
                base,
                dtype=dtype,
                heads=8,
                kv_heads=1,
                lengths=True,
                first_key="row",
                causal=False,
                queries=190,
                keys=333,
            ),
            change(base, dtype=dtype, first_key="query", queries=500, keys=500, dim=128, value_dim=64),
            change(base, dtype=dtype, first_key="query", lengths=True, queries=300, keys=350, heads=2, kv_heads=1),
            change(base, dtype=dtype, layout="token", dim=128, value_dim=128, batch=3),
            change(base, dtype=dtype, layout="sliced", queries=200, keys=200),
            change(base, dtype=dtype, layout="sliced", dim=50, value_dim=129),
            change(base, dtype=dtype, queries=1, keys=1),
            change(base, dtype=dtype, layers=1, queries=1000, keys=1000),
            change(base, dtype=dtype, layers=5, queries=300, keys=300),
            change(base, dtype=dtype, layers=16, dim=128, value_dim=128),
            # Blocks of 192 and 256 queries, of which some see nothing of a tile of keys, at either end.
            change(base, dtype=dtype, first_key="query", queries=577, keys=705, heads=4, kv_heads=2),
            change(base, dtype=dtype, lengths=True, queries=449, keys=900, dim=128, value_dim=128),
            change(base, dtype=dtype, lengths=True, first_key="row", causal=False, queries=390, keys=650, layers=3),
            change(base, dtype=dtype, scale=-0.3),
            change(base, dtype=dtype, scale=0.0),
        ]
    cases += [
        change(base, queries=2048, keys=2048, heads=16, kv_heads=16, layers=1),
        change(base, queries=2048, keys=2048, heads=16, kv_heads=4, dim=128, value_dim=128, layers=4),
        change(base, queries=1500, keys=4096, heads=8, kv_heads=8, batch=1, layers=3),
    ]
    # More pieces of work than processors, of different size, of which some are empty.
    many = change(base, batch=3, heads=24, kv_heads=6, queries=600, keys=600, layers=2, lengths=True)
    cases += [change(many, dtype=dtype, dim=dim, value_dim=dim) for dtype in ("bf16", "fp16") for dim in (64, 128)]
    cases += [change(many, first_key="query", keys=450, dim=256, value_dim=256)]
    # A row's later scores are larger than those of its first tile: within the range of what is relative to these, and beyond.
    for dtype, dim, sink in [("bf16", d, x) for d in (64, 128, 256) for x in (15.0, 40.0, 120.0)] + [
        ("fp16", 64, 15.0)
    ]:
        sized = change(base, dtype=dtype, queries=700, keys=700, dim=dim, value_dim=dim, sink=sink, layers=3)
        cases += [sized, change(sized, lengths=True, batch=3, causal=False)]
    cases += [
        change(base, dtype=dtype, batch=1, heads=1, kv_heads=1, queries=8192, keys=8192, layers=2, own=13.0)
        for dtype in ("bf16", "fp16")
    ]
    decode = [
        change(
            base,
            dtype=dtype,
            queries=1,
            causal=False,
            layers=1,
            heads=heads,
            kv_heads=kv_heads,
            keys=keys,
            dim=dim,
            value_dim=value_dim,
            first_key=first_key,
            layout=layout,
            batch=batch,
        )
        for dtype in DTYPES
        for heads, kv_heads, keys, dim, value_dim, first_key, layout, batch in (
            (8, 2, 2000, 64, 64, "", "head", 3),
            (8, 8, 1000, 128, 128, "", "token", 2),
            (32, 1, 700, 128, 128, "row", "head", 2),
            (6, 2, 513, 256, 256, "row", "head", 2),
            (4, 2, 255, 40, 72, "", "sliced", 2),
            (2, 1, 1, 64, 64, "", "head", 1),
            (32, 8, 8192, 128, 128, "", "head", 1),
            (5, 1, 3001, 80, 33, "row", "head", 2),
            (16, 8, 1500, 128, 128, "row", "head", 33),  # one block a row
            (16, 8, 500, 64, 64, "", "head", 12),  # a cluster of two blocks a row
            (16, 8, 3000, 64, 64, "row", "token", 12),  # more
        )
    ]
    return cases, decode


def backward_grid() -> list[Case]:
    """Groups of as many layers as change how the backward holds their values, over several blocks of keys and queries."""
    base = Case(queries=320, keys=450, heads=4, kv_heads=2)
    change = dataclasses.replace
    cases = []
    for dtype in ("bf16", "fp16"):
        for dim in (64, 128):
            sized = change(base, dtype=dtype, dim=dim, value_dim=dim)
            cases += [change(sized, layers=layers) for layers in (1, 2, 3, 4, 5, 6, 7, 9)]
            cases += [
                change(sized, layers=4, lengths=True, first_key="query", queries=700, keys=700),
                change(sized, layers=1, lengths=True, first_key="row", causal=False),
                change(sized, layers=4, layout="token", queries=1000, keys=1000, batch=1),
                change(sized, layers=2, queries=450, keys=77),  # rows that see nothing
            ]
    return cases


def nan_grid() -> list[Case]:
    """Groups whose keys and values hold NaN, on every kernel: "sliced" takes the portable ones, and the number of layers
    decides which backward serves."""
    base = Case(heads=4, kv_heads=2, queries=300, keys=300, causal=False)
    return [
        dataclasses.replace(base, dtype=dtype, dim=dim, value_dim=dim, layout=layout, layers=layers)
        for dtype in DTYPES
        for dim in (64, 128, 256)
        for layout in ("head", "sliced")
        for layers in (1, 3, 9)
    ]


def kv_grid() -> list[Case]:
    """Layers on shared keys and values, on every kernel that adds to the float32 sums of the layer behind it."""
    base = Case(queries=320, keys=450, heads=4, kv_heads=2, layers=3)
    return [
        dataclasses.replace(base, dtype=dtype, dim=dim, value_dim=value_dim, layout=layout, lengths=layout == "head")
        for dtype in DTYPES
        for dim, value_dim in ((64, 64), (128, 128), (40, 72), (256, 256))
        for layout in ("head", "token", "sliced")
    ]
