"""EPAS's claims on one GPU: `python -m benchmarks.claims.epas train | decode`.

train: tokens a second of a training step of a 1.26B LLaMA whose upper two thirds share Q and K, against the same model compiled
with the best SDPA backend; and beside it the saving that the measured parts of the baseline predict. At length 2048 with 32
heads of 64, and at 8192 with 16 heads of 128. The paper: up to +11.1 % training throughput; our goals 1.09x and 1.14x.

decode: tokens a second behind a context of 8192 tokens, batch 32, one CUDA graph a step, against the same model with nothing
shared. The paper: up to +29 %; our goal 1.40x (bytes allow 1.48x).
"""

from __future__ import annotations

import copy
import gc
import statistics
import sys
from typing import Any

import torch

import effcore
from benchmarks.claims import _sharing as sharing
from effcore.models import SharedCache

FRACTION = 2 / 3


def predicted_seconds_saved(batch: int, heads: int, length: int, dim: int, layers: int, start: int) -> dict[str, float]:
    """What sharing takes away: two projections a consumer, and the attention products 7n -> 5n + 2 of the group of n layers."""
    consumers, width = layers - start, heads * dim
    forward, backward = sharing.attention_seconds(batch, heads, length, dim)
    projection = sharing.projection_seconds(batch * length, width, width)
    group = consumers + 1
    return {
        "projections": 2 * consumers * projection,
        "attention": (2 * group - 2) / 7 * (forward + backward),
    }


def train(quick: bool) -> list[dict]:
    rows: list[dict] = []
    for heads, length, batch in [(32, 2048, 8), (16, 8192, 2)] if not quick else [(32, 64, 2)]:
        model = sharing.llama(heads, quick=quick, length=length)
        layers = model.config.num_hidden_layers
        start = sharing.shared_from(layers, FRACTION)
        ours = effcore.share_activations(copy.deepcopy(model), mode="qk", start=start).compile_pieces()
        steps: dict[str, Any] = {}
        if sharing.CUDA:
            for name, backend in sharing.BACKENDS.items():
                compiled = torch.compile(copy.deepcopy(model))
                steps[f"compiled, SDPA {name}"] = sharing.Training(compiled, batch, length, backend)
        else:
            steps["compiled, SDPA"] = sharing.Training(torch.compile(copy.deepcopy(model)), batch, length)
        del model
        baselines = list(steps)
        steps[f"EPAS, {layers - start} of {layers} share qk"] = sharing.Training(ours, batch, length)
        heads = ours.config.num_attention_heads
        dim = ours.config.hidden_size // heads
        print(f"training, length {length}, {heads} heads of {dim}", flush=True)
        times = sharing.in_turns(steps, rounds=7, repeats=2 if quick else 4)
        made = sharing.rows_of(times, baselines, batch * length, "tokens/s", what="train", length=length, head_dim=dim)
        del steps, ours
        free()
        saved = predicted_seconds_saved(batch, heads, length, dim, layers, start)
        base = min(statistics.median(times[name]) for name in baselines)
        predicted = base / (base - sum(saved.values()))
        share = (made[-1]["ratio"] - 1) / (predicted - 1)
        print(
            f"  predicted from the baseline's parts: {predicted:.3f}x; reached {share:.0%} of that saving", flush=True
        )
        made[-1] |= {"predicted_ratio": predicted, "predicted_seconds_saved": saved}
        rows += made
    return rows


class Decoding:
    """One token a row behind ``context`` tokens; on a GPU one CUDA graph."""

    def __init__(self, model: Any, batch: int, context: int):
        self.model = model.eval()
        self.cache = SharedCache(model.config, model.layout, context + 8)
        self.ids = torch.randint(0, model.config.vocab_size, (batch, 1), device=sharing.DEVICE)
        self.context = context
        with torch.no_grad():
            for _ in range(3):
                self._step()
        self._fill()
        self.graph = None
        if sharing.CUDA:
            sharing.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.no_grad(), torch.cuda.graph(self.graph):
                self._step()

    def _fill(self) -> None:
        for store in self.cache._held:
            for buffer in store.buffers():
                buffer.normal_()

    def _step(self) -> None:
        self.logits = self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True).logits

    def __call__(self) -> None:
        self.cache.device_length.fill_(self.context)  # type: ignore[union-attr]
        if self.graph is not None:
            self.graph.replay()
        else:
            with torch.no_grad():
                self._step()


def decode(quick: bool) -> list[dict]:
    batch, context = (2, 64) if quick else (32, 8192)
    model = sharing.llama(32, quick=quick, length=context)
    layers = model.config.num_hidden_layers
    start = sharing.shared_from(layers, FRACTION)
    model = effcore.share_activations(model, mode="qk", shared=0).compile_pieces()
    times: dict[str, list[float]] = {}
    print(f"decoding behind {context} tokens, batch {batch}", flush=True)
    # One after the other: two caches of this size do not fit together.
    for _ in range(2):
        for name, first in {"nothing shared": layers, f"EPAS, {layers - start} of {layers} share qk": start}.items():
            model.set_layout(first) if first < layers else model.set_layout("_".join(map(str, range(layers))))
            step = Decoding(model, batch, context)
            times.setdefault(name, []).extend(sharing.in_turns({name: step}, rounds=7, repeats=8)[name])
            del step
            free()
    return sharing.rows_of(times, ["nothing shared"], batch, "tokens/s", what="decode", context=context, batch=batch)


def free() -> None:
    gc.collect()
    if sharing.CUDA:
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    options = sharing.arguments("epas", __doc__ or "", ("train", "decode")).parse_args(arguments)
    rows = {"train": train, "decode": decode}[options.claim](options.quick)
    sharing.write(options.json, f"epas {options.claim}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
