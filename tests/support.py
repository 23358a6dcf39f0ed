"""What the op tests share: the accuracy rule, inputs of every shape and layout, and memory that betrays unwritten elements."""

from __future__ import annotations

import socket

import torch
from torch import Tensor

from benchmarks.gate import poisoned_memory  # noqa: F401  # the tests' too

# What a refused argument raises: the core throws std::invalid_argument.
REFUSED = (ValueError, RuntimeError)


def assert_accurate(
    ours: Tensor, same_dtype: Tensor, exact: Tensor, *, what: str = "result", terms: float = 0.0
) -> None:
    """Our error against ``exact`` (computed in higher precision) is at most twice that of the same-dtype PyTorch computation.

    Norms are over the whole tensor and in the maximum; a small floor of a few roundings stands in where PyTorch happens to
    be exact. ``terms`` is the size of the terms that the result is a sum or a difference of: a result that cancels to
    nothing (the gradient of a softmax over one key) carries their rounding. NaN and infinities must be where ``exact`` has
    them.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == same_dtype.dtype, f"{what}: dtype {ours.dtype}, expected {same_dtype.dtype}"
    a, b, c = (t.detach().double().cpu() for t in (ours, same_dtype, exact))
    finite = torch.isfinite(c)
    assert torch.equal(torch.isnan(a), torch.isnan(c)), f"{what}: NaN in other places than the exact result"
    assert torch.equal(a[~finite & ~torch.isnan(c)], c[~finite & ~torch.isnan(c)]), f"{what}: infinities differ"
    a, b, c = a[finite], b[finite], c[finite]
    if not c.numel():
        return
    # Where the tensors are float64 themselves, "exact" has roundings of its own.
    rounding = torch.finfo(ours.dtype).eps * (8 if ours.dtype == torch.float64 else 1)
    for name, norm in (("rms", lambda t: t.square().mean().sqrt()), ("maximum", lambda t: t.abs().max())):
        error, allowed = (
            norm(a - c).item(),
            2 * norm(torch.nan_to_num(b - c)).item() + 2 * rounding * (norm(c).item() + terms),
        )
        assert error <= allowed, f"{what}: {name} error {error:.3e}, allowed {allowed:.3e} (scale {norm(c):.3e})"


def heads(batch: int, n: int, tokens: int, dim: int, dtype: torch.dtype, layout: str = "head", device="cpu") -> Tensor:
    """Random [B, H, S, D] in one of the memory layouts that models produce."""
    if layout == "token":  # a projection viewed as heads
        return torch.randn(batch, tokens, n, dim, device=device).to(dtype).transpose(1, 2)
    if layout == "sliced":  # a part of a fused projection: padded rows, an odd offset
        return torch.randn(batch, n, tokens, dim + 3, device=device).to(dtype)[..., 1 : dim + 1]
    if layout == "expanded":  # one head for all
        return torch.randn(batch, 1, tokens, dim, device=device).to(dtype).expand(batch, n, tokens, dim)
    assert layout == "head"
    return torch.randn(batch, n, tokens, dim, device=device).to(dtype)


LAYOUTS = ("head", "token", "sliced", "expanded")


def rows(batch: int, tokens: int, channels: int, dtype: torch.dtype, layout: str = "plain") -> Tensor:
    """Random [B, N, C] in memory orders that models produce."""
    if layout == "sliced":  # a part of a fused projection: padded rows, an odd offset
        return torch.randn(batch, tokens, channels + 3).to(dtype)[..., 1 : channels + 1]
    if layout == "expanded":
        return torch.randn(1, tokens, channels).to(dtype).expand(batch, tokens, channels)
    if layout == "token-major":
        return torch.randn(tokens, batch, channels).to(dtype).transpose(0, 1)
    return torch.randn(batch, tokens, channels).to(dtype)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
