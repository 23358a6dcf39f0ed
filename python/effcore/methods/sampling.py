"""Many samples of each prompt for one reading of it.

``generate(num_return_sequences=N)`` repeats the prompts N times and reads all of them. Here the prompts are read once, the
cache is repeated, and decoding goes on from there: with P prompt tokens at p seconds each and T new ones at t, N·P·p + T·t
becomes P·p + T·t. The samples are those of ``generate`` for the same seed, up to rounding. Models of transformers and of
effcore (their caches hold what layer groups share once).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effcore.errors import RunError
from effcore.methods._surroundings import evaluating


def check_logits(input_ids: Tensor, logits: Tensor) -> Tensor:
    """A logits processor for ``generate``: the logits [B, V] as they are; −∞ says that a token must not come.

    Raises:
        RunError: they hold NaN or +∞, of which ``generate`` would make token 0, or an error that names no cause.
    """
    if not logits.amax().item() < torch.inf:  # the maximum of NaN and others is NaN
        raise RunError("the model's logits hold NaN or infinity: its weights are damaged, or its training diverged")
    return logits


def sample_tokens(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    num_samples: int,
    max_new_tokens: int,
    seed: int | None = None,
    **options: Any,
) -> Tensor:
    """``num_samples`` continuations of each prompt.

    Args:
        model: a causal language model with ``generate``.
        input_ids: int64 [B, S], padded on the left.
        attention_mask: [B, S], 0 on padding; None: no padding.
        seed: of this call alone; None uses torch's generators as they are.
        options: for ``generate``; ``do_sample=True`` unless said otherwise.

    Returns:
        int64 [B, num_samples, T], T ≤ max_new_tokens: the new tokens, padded behind the end token.

    Raises:
        RunError: the logits hold NaN or infinity.
    """
    if num_samples < 1:
        raise ValueError(f"effcore.sample_tokens: num_samples must be positive, got {num_samples}")
    batch, length = input_ids.shape
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if not bool(mask[:, -1].all()):
        raise ValueError("effcore.sample_tokens: prompts must be padded on the left: the last column is masked")
    options = {"do_sample": True, "max_new_tokens": max_new_tokens} | options
    options["logits_processor"] = [*(options.get("logits_processor") or ()), check_logits]
    if options.get("pad_token_id") is None and getattr(model.generation_config, "pad_token_id", None) is None:
        end = model.generation_config.eos_token_id
        options["pad_token_id"] = end[0] if isinstance(end, list) else end if end is not None else 0
    devices = [input_ids.device] if input_ids.device.type == "cuda" else []
    caches = options.get("use_cache", getattr(model.generation_config, "use_cache", None)) is not False
    with evaluating(model), torch.random.fork_rng(devices=devices, enabled=seed is not None):
        if seed is not None:
            torch.random.default_generator.manual_seed(seed)
            for device in devices:  # not torch.manual_seed, which seeds the other GPUs' generators, too
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        # A prompt of one token has nothing to read ahead: its row would be padding alone.
        if caches and num_samples > 1 and int(mask.sum(1).min()) > 1:
            options["past_key_values"] = _read_once(model, input_ids[:, :-1], mask[:, :-1], num_samples, options)
        full = model.generate(
            input_ids.repeat_interleave(num_samples, 0),
            attention_mask=mask.repeat_interleave(num_samples, 0),
            **options,
        )
    return full[:, length:].view(batch, num_samples, -1)


def _read_once(model: Any, input_ids: Tensor, mask: Tensor, num_samples: int, options: dict[str, Any]) -> Any:
    """The cache of the prompts without their last tokens, each row ``num_samples`` times."""
    quiet = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    read = model.generate(
        input_ids,
        attention_mask=mask,
        max_new_tokens=1,
        min_new_tokens=0,
        use_cache=True,
        return_dict_in_generate=True,
        pad_token_id=options.get("pad_token_id"),
        **quiet,
    )
    cache = read.past_key_values
    cache.batch_repeat_interleave(num_samples)
    return cache


@dataclass(frozen=True)
class Response:
    """One sample: its text, its tokens without the end token, and whether it came to its end."""

    text: str
    tokens: list[int]
    ended: bool


def sample_responses(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    num_samples: int,
    max_new_tokens: int,
    batch_size: int = 16,
    seed: int = 0,
    **options: Any,
) -> Iterator[tuple[int, list[Response]]]:
    """(number of the prompt, its samples), batch by batch; prompts of like length share a batch of ``batch_size``.

    A batch's seed depends on its first prompt's number alone, and not on what was drawn before.
    """
    device = next(model.parameters()).device
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    if pad is None:
        raise ValueError("effcore.sample_responses: the tokenizer has neither a padding nor an end token")
    tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for prompt, ids in zip(prompts, tokens, strict=True):
        if not ids:
            raise ValueError(f"effcore.sample_responses: the prompt {prompt!r} has no tokens")
    order = sorted(range(len(prompts)), key=lambda i: len(tokens[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = len(tokens[chosen[-1]])
        ids = torch.tensor([[pad] * (longest - len(tokens[i])) + tokens[i] for i in chosen], device=device)
        mask = torch.tensor([[0] * (longest - len(tokens[i])) + [1] * len(tokens[i]) for i in chosen], device=device)
        drawn = sample_tokens(
            model,
            ids,
            mask,
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            seed=seed * 1_000_003 + chosen[0],
            pad_token_id=pad,
            eos_token_id=end,
            **options,
        )
        for i, rows in zip(chosen, drawn.tolist(), strict=True):
            responses = []
            for row in rows:
                kept = row[: row.index(end)] if end is not None and end in row else row
                responses.append(Response(tokenizer.decode(kept, skip_special_tokens=True), kept, len(kept) < len(row)))
            yield i, responses


def sample_texts(model: Any, tokenizer: Any, prompts: Sequence[str], **options: Any) -> list[list[str]]:
    """The texts of :func:`sample_responses`, ``num_samples`` for each prompt, in the order of the prompts."""
    found: list[list[str]] = [[] for _ in prompts]
    for i, responses in sample_responses(model, tokenizer, prompts, **options):
        found[i] = [response.text for response in responses]
    return found
