"""How check_attention.py runs a problem: groups on our kernels, on the reference or on SDPA, and how far results are apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from effcore.reference import attention as reference
from tests.cuda import checks


def error(x: Tensor, exact: Tensor) -> float:
    if not torch.isfinite(x).all():
        return float("inf")
    # A result that cancels to nothing (the gradient of a softmax over one key) carries the rounding of terms of about one.
    return ((x.double() - exact).norm() / exact.norm().clamp_min(1e-2 * x.numel() ** 0.5)).item() if x.numel() else 0.0


def group(
    module, q: Tensor, k: Tensor, values: list[Tensor], grads: list[Tensor], keep: str, **options
) -> dict[str, Tensor]:
    """An owner and its consumers, forward and backward, in `module` (ours or the reference)."""
    if len(values) == 1 and keep == "lse":
        outs = [module.attention(q, k, values[0], **options)]
    else:
        out, scores = module.attention_with_scores(q, k, values[0], consumers=len(values) - 1, keep=keep, **options)
        outs = [out, *(module.attention_from_scores(s, v) for s, v in zip(scores, values[1:], strict=True))]
    gradients = torch.autograd.grad(outs, (q, k, *values), grads)
    named = {"out": outs[0], "dq": gradients[0], "dk": gradients[1], "dv": gradients[2]}
    if len(values) > 1:
        named |= {"out_n": outs[-1], "dv_n": gradients[-1]}
    return {name: x.detach() for name, x in named.items()}


def kv_group(module, queries: list[Tensor], k: Tensor, v: Tensor, grads: list[Tensor], **options) -> dict[str, Tensor]:
    """Layers with queries of their own on shared keys and values, forward and backward."""
    shared = module.share_kv(k, v)
    outs = [module.attention_shared_kv(q, shared, **options) for q in queries]
    gradients = torch.autograd.grad(outs, (k, v, *queries), grads)
    return {"out": outs[-1].detach()} | dict(
        zip(("dk", "dv", "dq", "dq_n"), (*gradients[:3], gradients[-1]), strict=True)
    )


def sdpa_group(
    q: Tensor, k: Tensor, values: list[Tensor], grads: list[Tensor], mask: Tensor, scale: float | None
) -> dict[str, Tensor]:
    """The same dtype's computation that the error rule compares with: a full attention for each layer."""
    heads = q.shape[1]
    q, k, *values = (
        t.detach().contiguous().requires_grad_() for t in (q, k, *values)
    )  # SDPA's kernels fail on odd strides
    grads = [g.contiguous() for g in grads]
    outs = [
        F.scaled_dot_product_attention(
            q, reference.repeat_kv(k, heads), reference.repeat_kv(v, heads), attn_mask=mask, scale=scale
        )
        for v in values
    ]
    gradients = torch.autograd.grad(outs, (q, k, *values), grads)
    return {
        name: x.nan_to_num()
        for name, x in zip(
            ("out", "dq", "dk", "dv", "out_n", "dv_n"), (outs[0], *gradients[:3], outs[-1], gradients[-1]), strict=True
        )
    }


def int32(*x: int) -> Tensor:
    return torch.tensor(x, device="cuda", dtype=torch.int32)


def twice(run: Callable[[], dict]) -> list[dict]:
    """Two runs, each in memory filled with NaN; their bits must agree."""
    runs = []
    for _ in range(2):
        checks.poison()
        runs.append(run())
    return runs


def row_of(what: str, passed: bool) -> dict:
    """A problem that has no errors to compare."""
    worst = 0.0 if passed else float("inf")
    return {"case": what, "keep": "", "identical": True, "errors": {}, "worst": worst, "passed": passed}
