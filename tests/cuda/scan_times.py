"""How fast the CUDA kernels of the scan family are, beside their bounds and their peers: what `check_scan.py --time` prints."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effcore.ops import scan as ops
from effcore.reference import scan as ref

try:
    import selective_scan_cuda  # mamba-ssm's
except ImportError:
    selective_scan_cuda = None


def times(calls: dict[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """Median milliseconds on the GPU, the calls in turn, the second-level cache flushed before each; the GPU waits a little
    before each, so that launches are queued and a slow host does not count."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    found: dict[str, list[float]] = {n: [] for n in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            flush.zero_()
            torch.cuda._sleep(3_000_000)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if i >= 2:
                found[name].append(begin.elapsed_time(end))
    return {n: statistics.median(t) for n, t in found.items()}


def spinning_clock() -> float:
    """Clocks a second, of a kernel that waits for so many of them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)
    begin.record()
    torch.cuda._sleep(20_000_000)
    end.record()
    torch.cuda.synchronize()
    return 20_000_000 / (begin.elapsed_time(end) * 1e-3)


def passes(call: Callable[[], Any]) -> int:
    """How often a scan's forward goes through its tokens: twice where states are carried from chunk to chunk."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return 1 + any("carry_kernel" in event.name for event in profiler.events())


class Peer:
    """mamba-ssm's kernels (its extension module) on its own layout, [B, E, L] contiguous, called without its Python."""

    def __init__(self, leaves: dict[str, Tensor], dout: Tensor) -> None:
        def across(t: Tensor) -> Tensor:
            return t.mT.contiguous()

        t = leaves
        self.inputs = [across(t["x"]), across(t["dt"]), t["A"], across(t["B"])[:, None], across(t["C"])[:, None]]
        self.inputs += [t["D"], across(t["z"]), t["dt_bias"]]
        self.dout = across(dout)

    def forward(self) -> tuple[Tensor, ...]:
        return selective_scan_cuda.fwd(*self.inputs, True)

    def both(self) -> None:
        out, states, *_ = self.forward()
        selective_scan_cuda.bwd(*self.inputs, self.dout, states, out, None, True, False)

    def agrees(self, ours: Tensor) -> bool:
        theirs = self.forward()[2].mT.float()
        return bool((ours.float() - theirs).abs().max() < 0.05 * theirs.abs().max())


def time_scan(tokens: int, channels: int, batch: int, states: int, rows: list[dict[str, Any]]) -> None:
    dtype = torch.bfloat16
    step = torch.empty(channels, device="cuda").uniform_(-6.9, -2.3).exp()
    new = lambda *s: torch.randn(s, device="cuda").to(dtype)  # noqa: E731
    shape = (batch, tokens, channels)
    leaves = {
        "x": new(*shape),
        "dt": new(*shape),
        "A": -torch.arange(1.0, states + 1, device="cuda").expand(channels, states).contiguous(),
        "B": new(batch, tokens, states),
        "C": new(batch, tokens, states),
        "D": torch.ones(channels, device="cuda"),
        "z": new(*shape),
        "dt_bias": torch.expm1(step).log(),
    }
    wanted = {n: t.clone().requires_grad_() for n, t in leaves.items()}
    dout = new(*shape)

    def forward() -> None:
        ops.selective_scan(**leaves, dt_softplus=True)

    def both() -> None:
        torch.autograd.grad(ops.selective_scan(**wanted, dt_softplus=True), list(wanted.values()), dout)

    calls: dict[str, Callable[[], Any]] = {"forward": forward, "both": both}
    agrees = None
    if selective_scan_cuda is not None:
        peer = Peer(leaves, dout)
        agrees = peer.agrees(ops.selective_scan(**leaves, dt_softplus=True))
        calls |= {"peer forward": peer.forward, "peer both": peer.both}
    found = times(calls)
    if batch * tokens == 2048:  # the loop keeps some hundred bytes a pair for its backward

        def loop() -> None:
            torch.autograd.grad(ref.selective_scan(**wanted, dt_softplus=True), list(wanted.values()), dout)

        found |= times({"loop": loop}, rounds=1)
    clock = spinning_clock() * torch.cuda.get_device_properties(0).multi_processor_count
    pairs = batch * tokens * channels
    copy = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    rate = 2 * copy.numel() / (times({"copy": lambda: copy.clone()})["copy"] * 1e-3)
    bounds = {"bytes": pairs * 8 / rate * 1e3, "instructions": pairs * (states + 3) / (16 * clock) * 1e3}
    row = {
        "shape": shape,
        "states": states,
        "ms": found,
        "bounds_ms": bounds,
        "copy_tb_s": rate / 1e12,
        "clock_ghz": spinning_clock() / 1e9,
        "passes": passes(forward),
        "peer_agrees": agrees,
    }
    rows.append(row)
    bound = max(bounds.values())
    text = f"scan B={batch} L={tokens} E={channels} N={states}: forward {found['forward']:.3f} ms"
    text += f" (bounds: bytes {bounds['bytes']:.3f}, instructions {bounds['instructions']:.3f}: {bound / found['forward']:.0%})"
    text += f", forward+backward {found['both']:.3f}"
    if agrees is not None:
        text += f"; mamba-ssm {found['peer forward']:.3f} ({found['peer forward'] / found['forward']:.2f}x)"
        text += f", {found['peer both']:.3f} ({found['peer both'] / found['both']:.2f}x), agrees: {agrees}"
    if "loop" in found:
        text += f"; the loop in torch {found['loop']:.0f} ({found['loop'] / found['both']:.0f}x)"
    print(text, flush=True)


def time_conv(tokens: int, channels: int, batch: int, rows: list[dict[str, Any]]) -> None:
    x = torch.randn(batch, tokens, channels, device="cuda").bfloat16()
    weight, bias = torch.randn(channels, 4, device="cuda").bfloat16(), torch.randn(channels, device="cuda").bfloat16()
    wanted, dout = [t.clone().requires_grad_() for t in (x, weight, bias)], torch.randn_like(x)

    def torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=channels)).mT

    def our_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.causal_conv1d(x, weight, bias, activation="silu")

    found = times(
        {
            "forward": lambda: our_conv(x, weight, bias),
            "both": lambda: torch.autograd.grad(our_conv(*wanted), wanted, dout),
            "torch forward": lambda: torch_conv(x, weight, bias),
            "torch both": lambda: torch.autograd.grad(torch_conv(*wanted), wanted, dout),
        }
    )
    rows.append({"conv": (batch, tokens, channels), "ms": found})
    size = x.numel() * 2
    text = f"conv B={batch} L={tokens} E={channels}:"
    for name, passes in (("forward", 2), ("both", 5)):
        rate = passes * size / found[name] / 1e9
        text += f" {name} {found[name]:.3f} ms ({rate:.2f} TB/s, torch {found['torch ' + name]:.3f})"
    print(text, flush=True)


def report() -> list[dict[str, Any]]:
    """Prints a line a shape; the numbers behind it."""
    rows: list[dict[str, Any]] = []
    for batch, tokens, channels, states in (
        (8, 2048, 2048, 16), (1, 16384, 2048, 16), (32, 512, 2048, 16), (4, 2048, 2048, 16), (1, 2048, 2048, 16),
        (4, 2048, 2048, 64),
    ):  # fmt: skip
        time_scan(tokens, channels, batch, states, rows)
    time_conv(2048, 2048, 8, rows)
    return rows
