"""Other people's causal attention on a GPU, each with the inputs in the memory order that it asks for.

SDPA's flash and cuDNN backends, FlexAttention (compiled, with a block mask), and flash-attn 4 (PyPI: flash-attn-4) where it is
installed. What cannot be imported or does not run is left out, and said by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gate import relative_error

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """``attend`` takes q, k, v as :meth:`inputs` gives them: [B, H, S, D], or [B, S, H, D] where ``token_major``."""

    name: str
    attend: Attend
    token_major: bool = False

    def inputs(self, *tensors: Tensor) -> list[Tensor]:
        """The same numbers as leaves of their own (with a gradient where the given ones have one)."""
        if not self.token_major:
            return [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        return [t.detach().transpose(1, 2).contiguous().requires_grad_(t.requires_grad) for t in tensors]

    def gradients(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
        """out, dq, dk and dv, all head-major."""
        leaves = self.inputs(*(t.detach().requires_grad_() for t in (q, k, v)))
        out = self.attend(*leaves)
        made = [out.detach(), *torch.autograd.grad(out, leaves, self.inputs(dout)[0])]
        return [t.transpose(1, 2) for t in made] if self.token_major else made


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@cache
def _causal_blocks(length: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, query, key: query >= key, None, None, length, length, device="cuda")


def _flex() -> Attend:
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    torch._functorch.config.donated_buffer = False  # its backward is timed alone, several times behind one forward
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=_causal_blocks(q.shape[2]))


def _flash_attn_4() -> Attend:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash_attn_func(q, k, v, causal=True)
        return result[0] if isinstance(result, tuple) else result  # some releases return the log-sum-exp as well

    return attend


_MAKERS: dict[str, Callable[[], Attend]] = {
    "flash": lambda: lambda q, k, v: sdpa(SDPBackend.FLASH_ATTENTION, q, k, v),
    "cudnn": lambda: lambda q, k, v: sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v),
    "flex": _flex,
    "flash-attn 4": _flash_attn_4,
}
PEERS = tuple(_MAKERS)


def find_peers(names: Sequence[str] = PEERS) -> dict[str, Peer]:
    """Those of ``names`` that can be imported here."""
    found = {}
    for name in names:
        try:
            found[name] = Peer(name, _MAKERS[name](), token_major=name == "flash-attn 4")
        except ImportError as problem:
            print(f"  {name} is left out: {problem}", file=sys.stderr, flush=True)
    return found


def working(peers: dict[str, Peer], ours: Attend, *inputs: Tensor) -> dict[str, Peer]:
    """Those that run on these q, k, v and dout and agree with ``ours``, forward and backward, within a hundredth."""
    expected = Peer("effcore", ours).gradients(*inputs)
    found = {}
    for name, peer in peers.items():
        try:
            error = max(relative_error(a, b.double()) for a, b in zip(peer.gradients(*inputs), expected, strict=True))
        except Exception as problem:  # it does not take these inputs
            print(f"  {name}: {type(problem).__name__}: {str(problem)[:200]}", file=sys.stderr, flush=True)
            continue
        if error <= 1e-2:
            found[name] = peer
        else:
            print(f"  {name}: wrong result, off by {error:.1e}", file=sys.stderr, flush=True)
    return found
