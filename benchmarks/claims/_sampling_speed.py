"""Sampling with one reading of each prompt against generate(num_return_sequences=N), alternating in one process.

What the lengths allow is peer / (peer − N readings + one reading), each reading measured by itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import effcore
from benchmarks.claims._small_lm import fresh
from effcore.methods.sampling import sample_tokens


def _large(length: int) -> Any:
    """TinyLlama's shape (1.1 billion parameters), random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=length,
    )
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16)


def sampling(device: str, rounds: int) -> Iterator[dict]:
    """A row a model and lengths, as they are measured: LLaMA with random weights, plain and sharing activations."""
    # Seconds of processors on the CPU, which other work on the machine disturbs less.
    cuda = device == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    cases = ((2048, 32, 16), (4096, 64, 16)) if cuda else ((256, 16, 8), (256, 64, 8))
    for prompt, new, n in cases:
        for sharing in (None, "qk", "kv"):
            model: Any = _large(max(c[0] + c[1] for c in cases)) if cuda else fresh(0, layers=6, width=256)
            model = model.to(device).eval()
            model.config.max_position_embeddings = 8192
            model.generation_config.eos_token_id = None  # every sample has the same length
            if sharing is not None:
                model = effcore.share_activations(model, mode=sharing, start=model.config.num_hidden_layers // 2)
            ids = torch.randint(0, 256, (2, prompt), device=device)
            settings = {"max_new_tokens": new, "do_sample": True, "top_k": 0, "pad_token_id": 257}

            def ours(model=model, ids=ids, n=n, settings=settings):
                sample_tokens(model, ids, num_samples=n, **settings)

            def peer(model=model, ids=ids, n=n, settings=settings):
                with torch.no_grad():
                    model.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=n, **settings)

            def reading(count=1, model=model, ids=ids):
                with torch.no_grad():
                    model(ids.repeat_interleave(count, 0), use_cache=True, logits_to_keep=1)

            calls: dict[str, Callable[[], None]] = {
                "ours": ours,
                "peer": peer,
                "read": reading,
                "read all": partial(reading, n),
            }
            times: dict[str, list[float]] = {name: [] for name in calls}
            for round_ in range(rounds + 1):
                for name, call in calls.items():
                    start = clock()
                    call()
                    if cuda:
                        torch.cuda.synchronize()
                    if round_:
                        times[name].append(clock() - start)
            middle = {name: statistics.median(values) for name, values in times.items()}
            decode = middle["peer"] - middle["read all"]
            allowed = middle["peer"] / (middle["read"] + decode)
            ratio = statistics.median(p / o for p, o in zip(times["peer"], times["ours"], strict=True))
            row: dict[str, Any] = {
                "model": sharing or "plain",
                "prompt": prompt,
                "new": new,
                "samples": n,
                "ratio": ratio,
                "allowed": allowed,
            }
            row |= {"share": ratio / allowed, "seconds": middle}
            print(
                f"{row['model']:<6} {prompt} + {new} tokens, N = {n}: {ratio:.2f}x of {allowed:.2f}x allowed "
                f"({row['share']:.0%})",
                flush=True,
            )
            yield row


def table(rows: list[dict]) -> str:
    """A line a model; for each pair of lengths the ratio, what they allow, and the share."""
    names = {
        "plain": "LLaMA of transformers",
        "qk": "QK shared by half of the layers",
        "kv": "KV shared by half of the layers",
    }
    lengths = list(dict.fromkeys((row["prompt"], row["new"]) for row in rows))
    lines = ["| | " + " | ".join(f"ratio, {prompt:,} + {new} tokens | allowed" for prompt, new in lengths) + " |"]
    lines.append("|---" * (1 + 2 * len(lengths)) + "|")
    for model, name in names.items():
        found = {(row["prompt"], row["new"]): row for row in rows if row["model"] == model}
        if found:
            cells = [
                f"{row['ratio']:.2f}× | {row['allowed']:.2f}× ({row['share']:.0%})" if row else " | "
                for row in map(found.get, lengths)
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
