"""Decoding steps of FlowHN beside those of a LLaMA of as many parameters: as their models run them, and from CUDA graphs.

transformers' LLaMA takes flash attention without a mask: with the backend that SDPA takes by itself on Hopper its steps took
four times as long. FlowHN's steps go through a whole routing chunk, so that every path through its blocks is among them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import StaticCache

import effcore
from benchmarks.claims import _hybrids as hybrids
from benchmarks.claims import _sharing as sharing
from benchmarks.claims import epas
from effcore.models import FlowHNCache, SharedCache

STEPS = 64  # of the LLaMA, whose steps are alike


def _milliseconds(step: Callable[[], Any], count: int, before: Callable[[], Any] = lambda: None) -> list[float]:
    times = []
    for _ in range(count):
        before()
        sharing.synchronize()
        begin = time.perf_counter()
        step()
        sharing.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def _captured(step: Callable[[], Any], reset: Callable[[], Any]) -> Callable[[], Any]:
    """``step`` as a CUDA graph; on a CPU itself. ``reset`` comes before each, and is not a part of it."""
    if not sharing.CUDA:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            reset()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def flowhn(model: Any, batch: int, context: int) -> Iterator[tuple[str, list[float]]]:
    """(how, milliseconds of each step behind ``context`` tokens) of a FlowHN model."""
    turn = model.config.routing_length
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device=sharing.DEVICE)
    before = max(context - turn, 1)  # steps of a turn before those that count: they capture every path
    for how in ("as it is", "CUDA graphs", "CUDA graphs, layers compiled"):
        cache = FlowHNCache(model.config, None if how == "as it is" else context + turn)
        model(input_ids=ids[:, :before], past_key_values=cache, use_cache=True, logits_to_keep=1)
        if "compiled" in how:
            hybrids.compiled(model)

        def step(cache: Any = cache) -> None:
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)

        _milliseconds(step, context - before)
        yield how, _milliseconds(step, turn)
        del cache, step
        sharing.free()


def llama(model: Any, batch: int, context: int) -> Iterator[tuple[str, list[float]]]:
    """The same of a LLaMA: with our kernels, nothing shared; transformers' with its growing cache, and one step behind a full
    static cache, captured, compiled or not."""
    ours = effcore.share_activations(model, mode="qk", shared=0, inplace=False).compile_pieces()
    cache: Any = SharedCache(ours.config, ours.layout, context + 8)
    yield "CUDA graphs, our attention", _milliseconds(epas.Decoding(ours, cache, batch, context), STEPS)
    del ours, cache
    sharing.free()
    model.set_attn_implementation("causal_sdpa_0")
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device=sharing.DEVICE)
    growing = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def grow(growing: Any = growing) -> None:
        model(input_ids=ids[:, :1], past_key_values=growing, use_cache=True)

    _milliseconds(grow, 8)
    yield "as it is", _milliseconds(grow, STEPS)
    del growing, grow
    sharing.free()
    cache = StaticCache(config=model.config, max_cache_len=context + 1)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    place = torch.full((1, 1), context, device=sharing.DEVICE)

    def reset() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)

    def step() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, position_ids=place)

    yield "CUDA graphs", _milliseconds(_captured(step, reset), STEPS, reset)
    hybrids.compiled(model)
    yield "CUDA graphs, layers compiled", _milliseconds(_captured(step, reset), STEPS, reset)


@torch.no_grad()
def decode(report: sharing.Report, size: str, batch: int, context: int, models: dict[str, Any]) -> None:
    """``models``: what makes each model, by name; those named LLaMA are transformers' LLaMAs, the others ours."""
    print(f"decoding behind {context} tokens, {size}, {batch} rows", flush=True)
    for name, make in models.items():
        model = make().eval()
        for how, times in (llama if name == "LLaMA" else flowhn)(model, batch, context):
            row: dict[str, Any] = {"what": "decode", "size": size, "batch": batch, "context": context, "model": name}
            row |= {"how": how, "steps": len(times), "ms": statistics.median(times), "slowest_ms": sorted(times)[-2]}
            print(f"  {name:<20} {how:<30} {row['ms']:8.3f} ms a token, slowest {row['slowest_ms']:.3f}", flush=True)
            report.add([row])
        del model
        sharing.free()
