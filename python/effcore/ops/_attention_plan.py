"""Measured tables (docs/attention-speed.md): whether a layer group keeps its probabilities or recomputes them, with the reason
in words; and whose kernels a layer that shares nothing runs on."""

from __future__ import annotations

import torch

# The fewest consumers with which a group's forward and backward is faster with P kept, by kernels and head dimension (up to
# so many). None: never, as far as it was measured, or by so little that it is not worth the memory.
_FEWEST_CONSUMERS: dict[str, dict[int, int | None]] = {
    "CPU": {1 << 30: 1},  # reading P costs less than computing it
    "portable CUDA": {64: None, 1 << 30: 2},  # P is written in a pass of its own
    # Reading P costs bandwidth: an H200 has 4.8 TB/s, an H100 3.4, where both multiply alike. Above 128 the portable kernels
    # serve the backward.
    "Hopper": {64: 7, 128: 1, 1 << 30: 2},
    "H100": {128: None, 1 << 30: 2},
}

# Up to how many tokens SDPA's kernels are faster than ours, forward and backward together, by head dimension. On Hopper at no
# length; than the portable kernels cuDNN's are 2 times as fast at every length, flash 1.15 times (on an H100: nothing older or
# newer has been measured).
_SDPA_FASTER_UP_TO: dict[str, dict[int, int]] = {"portable CUDA": {64: 1 << 30, 128: 1 << 30}}


@torch.compiler.assume_constant_result
def kernels_of(device_type: str, index: int | None) -> str:
    """Which kernels serve there, as the table names them."""
    if device_type != "cuda":
        return "CPU"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(index)[0] != 9:
        return "portable CUDA"
    slower_memory = any(name in torch.cuda.get_device_name(index) for name in ("H100", "H800"))
    return "H100" if slower_memory else "Hopper"


@torch.compiler.assume_constant_result
def default_budget(device_type: str, index: int | None) -> int:
    """Bytes that one group's probabilities may take: 2 GiB, on a GPU one part in 32 of its memory."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return 2 << 30
    return int(torch.cuda.get_device_properties(index).total_memory) // 32


def sdpa_is_faster(kernels: str, head_dim: int, tokens: int) -> bool:
    """Whether a causal layer that shares nothing is faster with SDPA's kernels, in 16 bits and without padding."""
    return tokens <= _SDPA_FASTER_UP_TO.get(kernels, {}).get(head_dim, 0)


def _fewest(kernels: str, head_dim: int) -> int | None:
    return next(fewest for dim, fewest in _FEWEST_CONSUMERS[kernels].items() if head_dim <= dim)


def choose(kernels: str, head_dim: int, consumers: int, num_bytes: int, budget: int) -> str:
    """``"lse"`` or ``"probs"`` for a group with so many consumers, whose probabilities take ``num_bytes``."""
    fewest = _fewest(kernels, head_dim)
    return "lse" if fewest is None or consumers < fewest or num_bytes > budget else "probs"


def explain(kernels: str, head_dim: int, consumers: int, num_bytes: int, budget: int) -> str:
    """Why :func:`choose` says what it says. Apart from it, since text of a symbolic size would fix that size."""
    fewest = _fewest(kernels, head_dim)
    if consumers == 0:
        return "no layer consumes the probabilities"
    where = f"{kernels} kernels at head dimension {head_dim}"
    if fewest is None:
        return f"{where}: computing P again was faster, or no more than 3 % slower, at every group size measured"
    if consumers < fewest:
        return f"{where}: reading P pays from {fewest} consumers on"
    if num_bytes > budget:
        return f"P takes {num_bytes / 2**30:.1f} GiB, the budget is {budget / 2**30:.1f} GiB (set_probs_budget)"
    return f"{where}: reading P was faster with {fewest} or more consumers"
