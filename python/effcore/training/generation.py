"""Text from a trained model, at any length of its shared region."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from effcore.errors import InputError, input_error
from effcore.methods.sampling import check_logits
from effcore.models import FlowHNForCausalLM, Layout, SharedLlamaForCausalLM
from effcore.training.models import load_model, quiet_transformers


class _Printer(TextStreamer):
    """Passes text on as soon as it is decided, in whole words."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def complete(
    path: str,
    prompt: str,
    *,
    region: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stream: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continues ``prompt`` with the model at ``path``.

    Args:
        region: how many of the last layers share; at most what the model was trained with. None: as it was trained.
        temperature: 0 is greedy.
        stream: is given the new text piece by piece.

    Returns:
        prompt, text, tokens, tokens_per_second, layout.

    Raises:
        InputError: no model at ``path``, a region that it was not trained for, a prompt that is too long.
        RunError: the model's logits hold NaN or infinity.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(path, dtype=torch.float32 if device == "cpu" else None, inference=True)
    model = model.to(device).eval()
    if region is not None:
        choose_region(model, region)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    inputs.pop("token_type_ids", None)
    length, limit = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    if length + max_new_tokens > limit:
        raise InputError(
            f"the prompt has {length} tokens; with {max_new_tokens} new ones that is more than the model's {limit} positions"
        )
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    if device == "cuda" and isinstance(model, (SharedLlamaForCausalLM, FlowHNForCausalLM)):
        options["cache_implementation"] = "static"  # their steps come from CUDA graphs
    set_seed(seed)
    began = time.perf_counter()
    with torch.inference_mode(), quiet_transformers():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            logits_processor=[check_logits],
            streamer=None if stream is None else _Printer(tokenizer, stream),
            **options,
        )
    seconds = time.perf_counter() - began
    new = output[0, length:]
    return {
        "prompt": prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "tokens_per_second": len(new) / seconds,
        "layout": str(getattr(model, "layout", Layout.full(model.config.num_hidden_layers))),
    }


def choose_region(model: Any, region: int) -> None:
    """Lets the last ``region`` layers share.

    Raises:
        InputError: the model was not trained to share so many, or lacks the projections for fewer.
    """
    trained = model.layout.shared if isinstance(model, SharedLlamaForCausalLM) else 0
    if region > trained:
        raise InputError(
            f"--region {region}: the model was trained with {trained} shared layers, and takes from 0 to that"
        )
    if trained == 0:
        return
    if region != trained and model.layout.top_owner is None:
        raise InputError(
            f"--region {region}: the model's layout {model.layout} is not one region; only {trained} fits it"
        )
    try:
        model.set_layout(Layout.from_shared(model.config.num_hidden_layers, region))
    except ValueError as error:
        raise input_error(error, f"--region {region}") from error
