"""How long the ranks of a large model take to find, and its factors to compute: a ResNet-152 and a LLaMA of 1.2 G parameters.

Random weights and inputs: neither the search's timings nor a factorisation's depend on them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.claims._low_rank_resnet import resnet
from effcore.methods import low_rank


def _llama(device: str) -> tuple[nn.Module, Tensor]:
    """The sizes of Llama-3.2-1B; four sequences of 2048."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        model: Any = transformers.LlamaForCausalLM(config)
        return model.to(torch.bfloat16), torch.randint(0, config.vocab_size, (4, 2048))


def _resnet(device: str) -> tuple[nn.Module, Tensor]:
    with torch.device(device):
        model: Any = resnet(152)
        model.to(torch.bfloat16, memory_format=torch.channels_last)
        x = torch.randn(256, 3, 224, 224, dtype=torch.bfloat16)
    return model, x.to(memory_format=torch.channels_last)


def search(device: str) -> Iterator[dict[str, Any]]:
    passes: tuple[tuple[bool, Literal["inference", "training"]], ...] = ((True, "inference"), (False, "training"))
    for weighted, measure in passes:
        for name, make in (("LLaMA 1.2B", _llama), ("ResNet-152", _resnet)):
            torch.manual_seed(0)
            model, x = make(device)
            begin = time.perf_counter()
            low_rank.decompose(model, 2.0, data=[x], measure=measure, weighted=weighted)
            if device == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - begin
            report = low_rank.report(model)
            row: dict[str, Any] = {"model": name, "measure": measure, "weighted": weighted, "seconds": took}
            row |= {
                "parts": report.seconds,
                "layers": len(report.layers),
                "decomposed": sum(x.rank is not None for x in report.layers),
            }
            parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in report.seconds.items())
            print(
                f"{name} {measure:9} {'weighted' if weighted else 'plain':8} {took:6.1f} s ({parts}); "
                f"{row['decomposed']} of {row['layers']} layers decomposed",
                flush=True,
            )
            yield row
            del model, x
            if device == "cuda":
                torch.cuda.empty_cache()
