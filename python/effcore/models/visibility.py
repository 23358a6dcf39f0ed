"""From masks, positions and documents to what the attention ops take: position ids and the first visible key of each query.

Causality and the cache's length bound what a query sees from above; ``first_key`` bounds it from below, and covers left
padding, packed documents and sliding windows alike. All of it is arithmetic on the device: with a static cache the number of
past tokens is a tensor, and nothing here reads it on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def resolve(
    batch: int,
    queries: int,
    past: int | Tensor,
    *,
    device: torch.device,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    carry: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Position ids [1 or B, S] and ``first_key`` (None, int32 [B] or int32 [B, S]) of ``queries`` new tokens a row.

    Args:
        past: tokens in the cache before these, on the host or on the device.
        attention_mask: [B, past + S] of ones, with zeros for padding on the left or on the right. A causal model needs no
            mask for padding on the right: nothing before it sees it.
        position_ids: [1 or B, S]. A position that does not follow its predecessor's begins a new document.
        document_ids: [1 or B, S], or ``cu_seqlens`` [documents + 1] of one packed row: the documents by name.
        carry: [B] the first visible key of the last cached token, where the cache knows one.
        capacity: of a static cache, whose mask may be as long as the cache.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    step = torch.arange(queries, device=device)
    padding = None
    if attention_mask is not None:
        padding = _left_padding(attention_mask, batch, queries, past, capacity)
    if cu_seqlens is not None:
        if document_ids is not None:
            raise ValueError("effcore: give document_ids or cu_seqlens, not both")
        document_ids = _documents(cu_seqlens, batch, queries, step)
    if document_ids is not None and not (isinstance(past, int) and past == 0):
        raise ValueError(
            "effcore: document_ids and cu_seqlens describe a whole sequence; with a cache give position_ids"
        )

    starts = None  # [1 or B, S]: where a document begins
    if document_ids is not None:
        _check_shape("document_ids", document_ids, batch, queries)
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    elif position_ids is not None:
        _check_shape("position_ids", position_ids, batch, queries)
        jumps = position_ids[:, 1:] != position_ids[:, :-1] + 1
        starts = torch.cat([position_ids[:, :1] == 0, jumps], dim=1)

    first = None if carry is None else carry[:, None].expand(batch, queries)
    if starts is not None:
        begin = torch.where(starts, step + past, 0)
        if first is not None:
            begin = torch.maximum(begin, first)
        first = begin.cummax(dim=1).values

    if position_ids is None:
        position_ids = (step + past)[None]
        if document_ids is not None:
            assert first is not None
            position_ids = position_ids - first
        elif padding is not None:
            position_ids = position_ids - padding[:, None]
        elif carry is not None:
            position_ids = position_ids - carry[:, None]
        position_ids = position_ids.clamp(min=0)

    if padding is not None:
        first = padding[:, None] if first is None else torch.maximum(first, padding[:, None])
    return position_ids, _compact(first, batch, queries)


def with_window(
    first_key: Tensor | None, window: int, batch: int, queries: int, past: int | Tensor, device: torch.device
) -> Tensor | None:
    """``first_key`` of layers that see the last ``window`` keys only, the query's own included."""
    if isinstance(past, int) and past + queries <= window:
        return first_key
    first = (torch.arange(queries, device=device) + (past - window + 1)).clamp(min=0).to(torch.int32)[None]
    if first_key is not None:
        first = torch.maximum(first, first_key if first_key.dim() == 2 else first_key[:, None])
    return first.expand(batch, queries).contiguous()


def last_queries(first_key: Tensor | None, queries: int) -> Tensor | None:
    """``first_key`` of the last ``queries`` tokens alone."""
    return first_key if first_key is None or first_key.dim() == 1 else first_key[:, -queries:].contiguous()


def _compact(first: Tensor | None, batch: int, queries: int) -> Tensor | None:
    """int32, and nothing at all where every key is visible (looked up on the CPU only: on a GPU it would synchronise)."""
    if first is None:
        return None
    on_host = first.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and not first.any():
        return None
    first = first.to(torch.int32)
    if first.shape[1] == 1:
        return first[:, 0].expand(batch).contiguous()
    return first.expand(batch, queries).contiguous()


def _left_padding(mask: Tensor, batch: int, queries: int, past: int | Tensor, capacity: int | None) -> Tensor:
    """[B] the number of masked tokens before the first visible one."""
    if mask.dim() != 2:
        raise ValueError(
            f"effcore: attention_mask must be 2D [batch, tokens], got {mask.dim()}D {tuple(mask.shape)}; additive and 4D "
            "masks are not supported (packed documents: position_ids, document_ids or cu_seqlens)"
        )
    expected = past + queries if isinstance(past, int) else None
    fits = mask.shape[1] == expected or (capacity is not None and queries <= mask.shape[1] <= capacity)
    if mask.shape[0] != batch or not fits:
        raise ValueError(
            f"effcore: attention_mask must be [{batch}, {expected or capacity}] (cached and new tokens), "
            f"got {tuple(mask.shape)}"
        )
    seen = mask != 0
    compiling = torch.compiler.is_compiling()
    # One synchronisation a prefill on a GPU, none a decoded token: there the mask only grew by a one.
    if not compiling and (mask.device.type == "cpu" or queries > 1):
        rises = (seen[:, 1:] & ~seen[:, :-1]).sum(1) + seen[:, 0]
        if bool((rises > 1).any()):
            raise ValueError(
                "effcore: attention_mask has a hole: padding may stand on the left or on the right of a row, not between "
                "tokens (a prompt padded on the right cannot be continued: pad it on the left)"
            )
        if bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError("effcore: attention_mask must hold zeros and ones; additive masks are not supported")
    return (seen.cumsum(1) == 0).sum(1)


def _documents(cu_seqlens: Tensor, batch: int, queries: int, step: Tensor) -> Tensor:
    if batch != 1 or cu_seqlens.dim() != 1:
        raise ValueError(
            f"effcore: cu_seqlens must be one row of offsets for a batch of 1, got {tuple(cu_seqlens.shape)} "
            f"for a batch of {batch}"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets = cu_seqlens.tolist()
        if not offsets or offsets[0] != 0 or offsets[-1] != queries or sorted(offsets) != offsets:
            raise ValueError(f"effcore: cu_seqlens must rise from 0 to the {queries} tokens of the row, got {offsets}")
    return torch.searchsorted(cu_seqlens.to(step.device)[1:].contiguous(), step, right=True)[None]


def _check_shape(name: str, tensor: Tensor, batch: int, queries: int) -> None:
    if tensor.dim() != 2 or tensor.shape[0] not in (1, batch) or tensor.shape[1] != queries:
        raise ValueError(
            f"effcore: {name} must be [{batch}, {queries}] (the new tokens alone), got {tuple(tensor.shape)}"
        )
