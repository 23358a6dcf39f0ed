"""The problems that check_routing.py runs: shapes, layouts and dtypes, their random tensors, and what a right result is."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.cuda.checks import poison

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
    (2, 40, 13, 768),
]

# batch, heads, kv_heads, tokens, dim
SCORES = [
    (2, 6, 6, 197, 64),
    (3, 6, 1, 197, 384),
    (1, 1, 1, 1, 1),
    (2, 12, 4, 50, 80),
    (2, 4, 4, 33, 33),
    (2, 3, 1, 600, 771),
    (64, 16, 16, 2048, 64),
    (3, 4, 4, 700, 100),
    (5, 6, 6, 1000, 33),
    (1, 32, 8, 4096, 128),
    (1, 16, 1, 3000, 1024),
    (1, 8, 2, 20000, 64),
    (1, 9, 1, 12000, 2048),
    (60, 3, 3, 1100, 72),  # long rows: two blocks each, of which one has one head more; one; too many
    (120, 2, 2, 1024, 64),
    (130, 1, 1, 2051, 200),
    (150, 2, 2, 1024, 64),
]


def same_dtype_scores(q: Tensor, k: Tensor) -> Tensor:
    """The class scores as a model computes them in its own dtype, the softmax in float32."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (q @ k.mT * q.shape[-1] ** -0.5).float().softmax(-1)[:, :, 0].mean(1)
