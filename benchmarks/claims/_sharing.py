"""What the claims on shared attention activations have in common: models of 1.1B parameters, training steps and decoding steps
in turns, and the time that a shared layer may save.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import effcore

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def llama(heads: int, *, quick: bool, length: int) -> LlamaForCausalLM:
    """A LLaMA of 22 layers and width 2048 with as many kv heads as query heads: 1.26B parameters (``quick``: a toy)."""
    torch.manual_seed(0)
    sizes = (256, 512, 4, 512) if quick else (2048, 5632, 22, 32000)
    config = LlamaConfig(
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
        num_hidden_layers=sizes[2],
        vocab_size=sizes[3],
        num_attention_heads=heads // 8 if quick else heads,
        max_position_embeddings=2 * length,
        attn_implementation="sdpa",
    )
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).to(DTYPE)


def shared_from(layers: int, fraction: float) -> int:
    """The first layer that shares, where the last ``fraction`` of the layers do (rounded up)."""
    return layers - min(-int(-layers * fraction // 1), layers - 1)


class Training:
    """A training step: forward, backward, fused AdamW, on fresh tokens."""

    def __init__(self, model: Any, batch: int, length: int, backend: SDPBackend | None = None):
        self.model, self.backend = model.train(), backend
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=CUDA)
        vocabulary = model.config.vocab_size
        self.tokens = [torch.randint(0, vocabulary, (batch, length), device=DEVICE) for _ in range(4)]
        self.count = 0

    def __call__(self) -> None:
        ids = self.tokens[self.count % len(self.tokens)]
        self.count += 1
        with sdpa_kernel(self.backend) if self.backend is not None and CUDA else contextlib.nullcontext():
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def in_turns(
    steps: Mapping[str, Callable[[], Any]], *, rounds: int, repeats: int, warm_up: int = 3
) -> dict[str, list[float]]:
    """Seconds a step, round by round; every round runs each ``repeats`` times."""
    for step in steps.values():
        for _ in range(warm_up):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            synchronize()
            times[name].append((time.perf_counter() - start) / repeats)
    return times


def seconds(call: Callable[[], Any], repeats: int = 10) -> float:
    """Median time of one call."""
    return statistics.median(in_turns({"call": call}, rounds=5, repeats=repeats)["call"])


def rows_of(times: Mapping[str, list[float]], baselines: list[str], units: float, unit: str, **more: Any) -> list[dict]:
    """A row a contender: units a second, and the ratio to the fastest baseline, median of the rounds' ratios."""
    best = min(baselines, key=lambda name: statistics.median(times[name]))
    rows = []
    for name, values in times.items():
        ratio = statistics.median(b / t for b, t in zip(times[best], values, strict=True))
        rows.append({**more, "model": name, unit: units / statistics.median(values), "ratio": ratio, "against": best})
        print(f"  {name:<42} {rows[-1][unit]:12,.0f} {unit:<10} {ratio:6.3f}x", flush=True)
    return rows


def attention_seconds(batch: int, heads: int, length: int, dim: int) -> tuple[float, float]:
    """Forward and backward of one causal layer with the fastest SDPA backend."""
    q, k, v, grad = (torch.randn(batch, heads, length, dim, device=DEVICE, dtype=DTYPE) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    best = (float("inf"), float("inf"))
    for backend in BACKENDS.values() if CUDA else [SDPBackend.FLASH_ATTENTION]:
        with sdpa_kernel(backend):
            forward = seconds(lambda: F.scaled_dot_product_attention(*leaves, is_causal=True))
            out = F.scaled_dot_product_attention(*leaves, is_causal=True)
            backward = seconds(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))  # noqa: B023
        best = min(best, (forward, backward), key=sum)
    return best


def projection_seconds(tokens: int, width: int, outputs: int) -> float:
    """Forward and backward of one projection of ``tokens`` rows."""
    x = torch.randn(tokens, width, device=DEVICE, dtype=DTYPE, requires_grad=True)
    w = torch.randn(outputs, width, device=DEVICE, dtype=DTYPE, requires_grad=True)
    grad = torch.randn(tokens, outputs, device=DEVICE, dtype=DTYPE)
    return seconds(lambda: torch.autograd.grad(F.linear(x, w), (x, w), grad))


def write(path: Path | None, claim: str, rows: list[dict]) -> None:
    machine = torch.cuda.get_device_name() if CUDA else "cpu"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "claim": claim,
            "machine": machine,
            "torch": torch.__version__,
            "effcore": effcore.__version__,
            "rows": rows,
        }
        path.write_text(json.dumps(report, indent=1))


def arguments(name: str, description: str, claims: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.claims.{name}", description=description)
    parser.add_argument("claim", choices=claims)
    parser.add_argument("--quick", action="store_true", help="a toy model: shows that the script runs")
    parser.add_argument("--json", type=Path, help="write the numbers")
    return parser
