"""What the attention cases share: other people's attention, and attention in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.case import Call, Candidate, Settings

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _sdpa(causal: bool) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def softmax_scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """P in the inputs' dtype, as one writes it by hand."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1)


def _eager(causal: bool) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_scores(q, k, causal) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    return attend


def _visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _flex(causal: bool) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[tuple[int, int], Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = q.shape[2], k.shape[2]
        if causal and shape not in masks:
            masks[shape] = create_block_mask(_visible, None, None, *shape, device=q.device.type)
        return compiled(q, k, v, block_mask=masks.get(shape), enable_gqa=q.shape[1] != k.shape[1])

    return attend


def peers(
    settings: Settings, use: Callable[[Attend], Call], *, causal: bool, compiled: bool = True
) -> tuple[Candidate, ...]:
    """PyTorch's own attention in all its forms; ``use`` makes a case's call of one. Those that a device, dtype or direction
    does not have raise when they are tried, and are left out."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION}
    if settings.cuda:
        backends |= {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    backends["math"] = SDPBackend.MATH
    found = [
        Candidate(f"sdpa {name}", use(_sdpa(causal)), partial(sdpa_kernel, backend))
        for name, backend in backends.items()
    ]
    if compiled and settings.compiled:
        found += [
            Candidate("compiled sdpa", use(torch.compile(_sdpa(causal), dynamic=False))),
            Candidate("compiled eager", use(torch.compile(_eager(causal), dynamic=False))),
            Candidate("compiled flex", _lazily(lambda: use(_flex(causal)))),
        ]
    return tuple(found)


def _lazily(make: Callable[[], Call]) -> Call:
    """Where making a call may fail already, it fails when it is first run."""
    made: list[Call] = []

    def call(inputs: dict[str, Tensor]) -> Sequence[Tensor]:
        if not made:
            made.append(make())
        return made[0](inputs)

    return call


def exact_attention(
    q: Tensor, k: Tensor, values: Sequence[Tensor], douts: Sequence[Tensor] = (), *, causal: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """In float64: the outputs of layers that share q and k, and with ``douts`` also (dq, dk, dv of each layer).

    One query head after the other, so that long sequences fit into memory.
    """
    with torch.no_grad():
        return _exact_attention(q, k, values, douts, causal)


def _exact_attention(
    q: Tensor, k: Tensor, values: Sequence[Tensor], douts: Sequence[Tensor], causal: bool
) -> tuple[list[Tensor], list[Tensor]]:
    group, scale = q.shape[1] // k.shape[1], q.shape[3] ** -0.5
    outs = [torch.empty(*q.shape[:3], v.shape[3], dtype=torch.float64, device=q.device) for v in values]
    dq, dk, *dvs = (torch.zeros(t.shape, dtype=torch.float64, device=q.device) for t in (q, k, *values))
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // group
            query, key = q[b, h].double(), k[b, g].double()
            probs = softmax_scores(query[None, None], key[None, None], causal)[0, 0]
            for out, v in zip(outs, values, strict=True):
                out[b, h] = probs @ v[b, g].double()
            if not douts:
                continue
            d_probs, delta = torch.zeros_like(probs), torch.zeros_like(probs[:, :1])
            for out, dout, v, dv in zip(outs, douts, values, dvs, strict=True):
                d_out = dout[b, h].double()
                d_probs += d_out @ v[b, g].double().mT
                delta += (d_out * out[b, h]).sum(-1, keepdim=True)
                dv[b, g] += probs.mT @ d_out
            d_scores = probs * (d_probs - delta) * scale
            dq[b, h] = d_scores @ key
            dk[b, g] += d_scores.mT @ query
    return outs, [dq, dk, *dvs] if douts else []
