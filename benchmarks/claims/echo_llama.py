"""ECHO-LLaMA's claims on one GPU: `python -m benchmarks.claims.echo_llama prefill | train | fit | memory`.

prefill: time to the first token of a prompt of 8192 tokens with the upper half of a 1.26B LLaMA on one K,V: only the last token
passes the upper layers. Against the same model compiled with the best SDPA backend, and against ours with nothing shared. Goal
1.7x.
train: a training step with two thirds of the layers sharing, length 2048, against the compiled model (goal 1.05x), against ours
with nothing shared, and against transformers' eager model (reported beside the paper's 1.77x).
fit: that step and transformers' eager one, each at the largest batch that the GPU's memory holds.
memory: bytes of cache a token, and rows of 8192 tokens that fit into the memory which the weights leave; on a GPU found by
decoding behind caches of so many rows. Goal 1.9x.
"""

from __future__ import annotations

import copy
import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

import effcore
from benchmarks.claims import _sharing as sharing
from effcore.models import SharedCache
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


def _works(run: Callable[[], Any]) -> bool:
    """Whether there is memory for it. What it made is given back."""
    try:
        run()
        sharing.synchronize()
    except torch.OutOfMemoryError:
        return False
    finally:
        sharing.free(compiled=False)
    return True


def _largest(works: Callable[[int], bool], bound: int) -> int:
    """The largest number up to ``bound`` that works, if every smaller one does (0: none)."""
    good, bad = 0, bound + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if works(middle) else (good, middle)
    return good


def _training(model: Any, batch: int, length: int, steps: int = 0) -> sharing.Training:
    """A step of training, of which some were done."""
    model.zero_grad(set_to_none=True)  # what a step left that found no memory
    step = sharing.Training(model, batch, length)
    for _ in range(steps):
        step()
    return step


def _training_rows(model: Any, length: int) -> int:
    """The largest batch with which this model trains, compiled for that batch. Memory grows by the row, so two small batches
    tell where to begin; 1 GiB is left for kernels that are loaded when they are first used."""
    peaks = []
    for batch in (4, 8):
        torch.cuda.reset_peak_memory_stats()
        _training(model, batch, length, 2)
        peaks.append(torch.cuda.max_memory_allocated())
        sharing.free(compiled=False)
    room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - (1 << 30)
    batch = 4 + int(4 * (room - peaks[0]) // (peaks[1] - peaks[0]))
    while True:
        torch.compiler.reset()  # or it runs what was compiled for any batch
        if _works(functools.partial(_training, model, batch, length, 3)):
            return batch
        print(f"  no memory for a batch of {batch}", flush=True)
        batch -= 1


def fit(report: sharing.Report, quick: bool, rounds: int) -> None:
    length = 64 if quick else 2048
    model = sharing.llama(32, quick=quick, length=length)
    layers = model.config.num_hidden_layers
    start = sharing.shared_from(layers, 2 / 3)

    def sharer() -> Any:
        return effcore.share_activations(model, mode="kv", start=start).compile_pieces()

    makers: dict[str, Callable[[], Any]] = {"transformers, eager": lambda: copy.deepcopy(model)}
    makers[f"ECHO, {layers - start} of {layers} share kv"] = sharer  # the last: it takes the model
    rows: list[dict] = []
    for name, make in makers.items():
        trained = make()
        batch = _training_rows(trained, length) if sharing.CUDA else 4
        step = _training(trained, batch, length)
        rate = batch * length / statistics.median(sharing.in_turns({name: step}, rounds=rounds, repeats=2)[name])
        rows.append({"what": "fit", "length": length, "model": name, "batch": batch, "tokens/s": rate})
        rows[-1] |= {"ratio": rate / rows[0]["tokens/s"], "against": rows[0]["model"]}
        print(f"  {name:<42} batch {batch:4} {rate:12,.0f} tokens/s {rows[-1]['ratio']:6.3f}x", flush=True)
        del trained, step
        sharing.free()
    report.add(rows)


def memory(report: sharing.Report, quick: bool, rounds: int) -> None:
    length = 64 if quick else 8192
    model = effcore.share_activations(sharing.llama(32, quick=quick, length=length), mode="kv", shared=0).eval()
    layers = model.config.num_hidden_layers
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    total = torch.cuda.get_device_properties(0).total_memory if sharing.CUDA else 16 << 30

    @torch.no_grad()
    def decode(batch: int) -> None:
        """Tokens behind a static cache that is empty, and behind one that is full but for this token."""
        cache = SharedCache(model.config, model.layout, length)
        ids = torch.zeros(batch, 1, dtype=torch.int64, device=sharing.DEVICE)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        assert cache.device_length is not None
        cache.device_length.fill_(length - 1)
        model(input_ids=ids, past_key_values=cache, use_cache=True)

    rows: list[dict] = []
    for name, first in {"nothing shared": None, "half share kv": layers // 2}.items():
        if first is not None:
            model.set_layout(first)
        size = cache_bytes_per_token(model.config, model.layout, sharing.DTYPE)
        bound = (total - weights) // (size * length)
        batch = _largest(lambda batch: _works(lambda: decode(batch)), bound) if sharing.CUDA else bound
        ratio = batch / rows[0]["batch"] if rows else 1.0
        row = {"what": "memory", "model": name, "cache_bytes_per_token": size, "bound": bound, "batch": batch}
        rows.append(row | {"ratio": ratio, "decoded": sharing.CUDA})
        print(f"  {name:<20} {size:10,} bytes/token   batch {batch:6,} of {bound:6,}   {ratio:.2f}x", flush=True)
    report.add(rows)


CLAIMS = {"prefill": prefill, "train": train, "fit": fit, "memory": memory}


def main(arguments: list[str] | None = None) -> int:
    options = sharing.arguments("echo_llama", __doc__ or "", tuple(CLAIMS)).parse_args(arguments)
    report = sharing.Report(options.json, f"echo-llama {options.claim}")
    CLAIMS[options.claim](report, options.quick, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
