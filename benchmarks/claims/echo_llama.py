"""ECHO-LLaMA's claims on one GPU: `python -m benchmarks.claims.echo_llama prefill | train | memory`.

prefill: time to the first token of a prompt of 8192 tokens with the upper half of a 1.26B LLaMA on one K,V: only the last token
passes the upper layers. Against the same model compiled with the best SDPA backend. Goal 1.7x.
train: a training step with two thirds of the layers sharing, length 2048, against the compiled model (goal 1.05x) and against
transformers' eager model (reported beside the paper's 1.77x).
memory: bytes of cache a token, and rows of 8192 tokens that fit into the memory which the weights leave. Goal 1.9x.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel

import effcore
from benchmarks.claims import _sharing as sharing
from effcore.models.cache import cache_bytes_per_token


class Prefill:
    """A prompt's pass: its K and V into a cache, the logits of its last token."""

    def __init__(self, model: Any, batch: int, length: int, backend: Any = None):
        self.model, self.backend = model.eval(), backend
        self.ids = torch.randint(0, model.config.vocab_size, (batch, length), device=sharing.DEVICE)

    def __call__(self) -> None:
        backends = self.backend if self.backend is not None else list(sharing.BACKENDS.values())
        with torch.no_grad(), sdpa_kernel(backends):
            self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)


def prefill(quick: bool) -> list[dict]:
    rows = []
    for heads, batch in [(32, 1), (16, 1)] if not quick else [(32, 1)]:
        length = 64 if quick else 8192
        model = sharing.llama(heads, quick=quick, length=length)
        layers = model.config.num_hidden_layers
        ours = effcore.share_activations(copy.deepcopy(model), mode="kv", start=layers // 2).compile_pieces()
        steps: dict[str, Any] = {}
        for name, backend in sharing.BACKENDS.items() if sharing.CUDA else [("flash", sharing.BACKENDS["flash"])]:
            steps[f"compiled, SDPA {name}"] = Prefill(torch.compile(copy.deepcopy(model)), batch, length, backend)
        baselines = list(steps)
        steps[f"ECHO, {layers - layers // 2} of {layers} share kv"] = Prefill(ours, batch, length)
        print(f"first token of {length}, {ours.config.num_attention_heads} heads", flush=True)
        times = sharing.in_turns(steps, rounds=7, repeats=3)
        rows += sharing.rows_of(
            times, baselines, batch * length, "tokens/s", what="prefill", length=length, heads=heads
        )
    return rows


def train(quick: bool) -> list[dict]:
    length, batch = (64, 2) if quick else (2048, 8)
    model = sharing.llama(32, quick=quick, length=length)
    layers = model.config.num_hidden_layers
    start = sharing.shared_from(layers, 2 / 3)
    ours = effcore.share_activations(copy.deepcopy(model), mode="kv", start=start).compile_pieces()
    steps: dict[str, Any] = {}
    for name, backend in sharing.BACKENDS.items() if sharing.CUDA else [("flash", sharing.BACKENDS["flash"])]:
        steps[f"compiled, SDPA {name}"] = sharing.Training(torch.compile(copy.deepcopy(model)), batch, length, backend)
    baselines = list(steps)
    steps["transformers, eager"] = sharing.Training(model, batch, length)
    steps[f"ECHO, {layers - start} of {layers} share kv"] = sharing.Training(ours, batch, length)
    print(f"training, length {length}", flush=True)
    times = sharing.in_turns(steps, rounds=7, repeats=2 if quick else 4)
    return sharing.rows_of(times, baselines, batch * length, "tokens/s", what="train", length=length)


def memory(quick: bool) -> list[dict]:
    length = 64 if quick else 8192
    model = effcore.share_activations(sharing.llama(32, quick=quick, length=length), mode="kv", shared=0)
    layers = model.config.num_hidden_layers
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    total = torch.cuda.get_device_properties(0).total_memory if sharing.CUDA else 16 << 30
    rows: list[dict] = []
    for name, first in {"nothing shared": None, "half share kv": layers // 2}.items():
        if first is not None:
            model.set_layout(first)
        size = cache_bytes_per_token(model.config, model.layout, sharing.DTYPE)
        batch = (total - weights) // (size * length)
        ratio = batch / rows[0]["batch"] if rows else 1.0
        rows.append({"what": "memory", "model": name, "cache_bytes_per_token": size, "batch": batch, "ratio": ratio})
        print(f"  {name:<20} {size:10,} bytes/token   batch {batch:6,}   {ratio:.2f}x", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    options = sharing.arguments("echo_llama", __doc__ or "", ("prefill", "train", "memory")).parse_args(arguments)
    rows = {"prefill": prefill, "train": train, "memory": memory}[options.claim](options.quick)
    sharing.write(options.json, f"echo-llama {options.claim}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
