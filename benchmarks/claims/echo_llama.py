"""ECHO-LLaMA's claims on one GPU: `python -m benchmarks.claims.echo_llama prefill | train | memory`.

prefill: time to the first token of a prompt of 8192 tokens with the upper half of a 1.26B LLaMA on one K,V: only the last token
passes the upper layers. Against the same model compiled with the best SDPA backend, and against ours with nothing shared. Goal
1.7x.
train: a training step with two thirds of the layers sharing, length 2048, against the compiled model (goal 1.05x), against ours
with nothing shared, and against transformers' eager model (reported beside the paper's 1.77x).
memory: bytes of cache a token, and rows of 8192 tokens that fit into the memory which the weights leave. Goal 1.9x.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch

import effcore
from benchmarks.claims import _sharing as sharing
from effcore.models.cache import cache_bytes_per_token


class Prefill:
    """A prompt's pass: its K and V into a cache, the logits of its last token."""

    def __init__(self, model: Any, batch: int, length: int, layout: Any = None):
        self.model, self.layout = model.eval(), layout
        self.ids = torch.randint(0, model.config.vocab_size, (batch, length), device=sharing.DEVICE)

    def __call__(self) -> None:
        if self.layout is not None:
            self.model.set_layout(self.layout)
        with torch.no_grad():
            self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)


def prefill(report: sharing.Report, quick: bool, rounds: int) -> None:
    for heads, batch in [(32, 1), (16, 1)] if not quick else [(32, 1)]:
        length = 64 if quick else 8192
        model = sharing.llama(heads, quick=quick, length=length)
        layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
        print(f"first token of {length}, {heads} heads", flush=True)
        attention = sharing.attention_seconds(batch, heads, length, model.config.hidden_size // heads)
        backend = min(attention, key=lambda name: attention[name][0])
        plain = f"compiled, SDPA {backend}"
        steps = {plain: Prefill(sharing.baseline(model, backend), batch, length)}
        ours = effcore.share_activations(model, mode="kv", start=layers // 2).compile_pieces()
        steps[sharing.CONTROL] = Prefill(ours, batch, length, sharing.nothing_shared(layers))
        steps[f"ECHO, {layers - layers // 2} of {layers} share kv"] = Prefill(ours, batch, length, layers // 2)
        times = sharing.in_turns(steps, rounds=rounds, repeats=3)
        report.add(
            sharing.rows_of(times, [plain], batch * length, "tokens/s", what="prefill", length=length, heads=heads)
        )
        del steps, ours, model
        sharing.free()


def train(report: sharing.Report, quick: bool, rounds: int) -> None:
    length, batch = (64, 2) if quick else (2048, 8)
    model = sharing.llama(32, quick=quick, length=length)
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    start = sharing.shared_from(layers, 2 / 3)
    print(f"training, length {length}", flush=True)
    attention = sharing.attention_seconds(batch, heads, length, model.config.hidden_size // heads)
    backend = min(attention, key=lambda name: sum(attention[name]))
    plain = f"compiled, SDPA {backend}"
    steps = {plain: sharing.Training(sharing.baseline(model, backend), batch, length)}
    steps["transformers, eager"] = sharing.Training(copy.deepcopy(model), batch, length)
    ours = effcore.share_activations(model, mode="kv", start=start).compile_pieces()
    steps[sharing.CONTROL] = sharing.Training(ours, batch, length, sharing.nothing_shared(layers))
    steps[f"ECHO, {layers - start} of {layers} share kv"] = sharing.Training(ours, batch, length, start)
    times = sharing.in_turns(steps, rounds=rounds, repeats=2 if quick else 3)
    report.add(sharing.rows_of(times, [plain], batch * length, "tokens/s", what="train", length=length))


def memory(report: sharing.Report, quick: bool, rounds: int) -> None:
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
    report.add(rows)


def main(arguments: list[str] | None = None) -> int:
    options = sharing.arguments("echo_llama", __doc__ or "", ("prefill", "train", "memory")).parse_args(arguments)
    report = sharing.Report(options.json, f"echo-llama {options.claim}")
    {"prefill": prefill, "train": train, "memory": memory}[options.claim](report, options.quick, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
