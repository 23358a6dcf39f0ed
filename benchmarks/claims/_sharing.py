"""What the claims on shared attention activations have in common: models of 1.1B parameters, training steps and decoding steps
in turns, and the time that a shared layer may save.

Two rows stand beside the sharing model. The *baseline* is transformers' own model in one compiled graph, with the fastest SDPA
backend and no mask: before torch 2.14 transformers writes the causal mask out while it compiles, and attention then runs over
all of it (`causal_sdpa`). The *control* is effcore's model with nothing shared: what sharing gains by itself is measured
against that, so that no other difference between the two runtimes counts as sharing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import effcore
from effcore.ops import attention as ops

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION} | ({"cuDNN": SDPBackend.CUDNN_ATTENTION} if CUDA else {})
CONTROL = "effcore, nothing shared"


def llama(heads: int, *, quick: bool, length: int) -> LlamaForCausalLM:
    """A LLaMA of 22 layers and width 2048 with as many kv heads as query heads: 1.26B parameters (``quick``: a toy)."""
    torch.manual_seed(0)
    sizes = (256, 512, 4, 512) if quick else (2048, 5632, 22, 32000)
    options: dict[str, Any] = {"attn_implementation": "sdpa"}
    config = LlamaConfig(
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
        num_hidden_layers=sizes[2],
        vocab_size=sizes[3],
        num_attention_heads=heads // 8 if quick else heads,
        max_position_embeddings=2 * length,
        **options,
    )
    with torch.device(DEVICE):
        model: Any = LlamaForCausalLM(config)
    return model.to(DTYPE)


def shared_from(layers: int, fraction: float) -> int:
    """The first layer that shares, where the last ``fraction`` of the layers do (rounded up)."""
    return layers - min(-int(-layers * fraction // 1), layers - 1)


def causal_sdpa(backend: SDPBackend) -> Callable[..., Any]:
    """transformers' SDPA attention with one backend, causal by SDPA's flag and never by a mask."""

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        with sdpa_kernel(backend):
            return sdpa_attention_forward(module, query, key, value, None, **options)

    return attention


# For a name that it does not know, transformers makes no mask at all.
for _number, _backend in enumerate(BACKENDS.values()):
    AttentionInterface.register(f"causal_sdpa_{_number}", causal_sdpa(_backend))


def baseline(model: LlamaForCausalLM, backend: str) -> Any:
    """A copy of ``model``, compiled as one graph, with this SDPA backend."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation(f"causal_sdpa_{list(BACKENDS).index(backend)}")
    return torch.compile(twin, fullgraph=True, dynamic=False)


class Training:
    """A training step: forward, backward, fused AdamW, on fresh tokens. ``layout`` is what a model of ours shares in it."""

    def __init__(self, model: Any, batch: int, length: int, layout: Any = None):
        self.model, self.layout = model.train(), layout
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=CUDA)
        vocabulary = model.config.vocab_size
        self.tokens = [torch.randint(0, vocabulary, (batch, length), device=DEVICE) for _ in range(4)]
        self.count = 0

    def __call__(self) -> None:
        if self.layout is not None:
            self.model.set_layout(self.layout)
        ids = self.tokens[self.count % len(self.tokens)]
        self.count += 1
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def nothing_shared(layers: int) -> str:
    """The layout in which every layer is its own owner."""
    return "_".join(map(str, range(layers)))


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
    return statistics.median(in_turns({"call": call}, rounds=3, repeats=repeats)["call"])


def rows_of(times: Mapping[str, list[float]], baselines: list[str], units: float, unit: str, **more: Any) -> list[dict]:
    """A row a contender: units a second, and the ratio to the fastest baseline, median of the rounds' ratios; and to the
    control, where there is one."""

    def ratio(to: str, name: str) -> float:
        return statistics.median(b / t for b, t in zip(times[to], times[name], strict=True))

    best = min(baselines, key=lambda name: statistics.median(times[name]))
    rows = []
    for name, values in times.items():
        rate = units / statistics.median(values)
        row = {**more, "model": name, unit: rate, "ratio": ratio(best, name), "against": best}
        text = f"  {name:<42} {rate:12,.0f} {unit:<10} {row['ratio']:6.3f}x"
        if CONTROL in times and name != CONTROL and name not in baselines:
            row["ratio_to_control"] = ratio(CONTROL, name)
            text += f"   {row['ratio_to_control']:.3f}x nothing shared"
        print(text, flush=True)
        rows.append(row)
    return rows


def attention_seconds(batch: int, heads: int, length: int, dim: int) -> dict[str, tuple[float, float]]:
    """Forward and backward of one causal layer with each SDPA backend."""
    q, k, v, grad = (torch.randn(batch, heads, length, dim, device=DEVICE, dtype=DTYPE) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    found = {}
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):
            forward = seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        backward = seconds(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))  # noqa: B023
        found[name] = forward, backward
    return found


def decode_seconds(batch: int, heads: int, keys: int, dim: int) -> dict[str, float]:
    """One query a row against a cache of ``keys`` tokens with each SDPA backend."""
    q, k, v = (torch.randn(batch, heads, n, dim, device=DEVICE, dtype=DTYPE) for n in (1, keys, keys))

    def attend(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return {name: seconds(partial(attend, backend)) for name, backend in BACKENDS.items()}


def group_seconds(batch: int, heads: int, length: int, dim: int, layers: int) -> float:
    """Forward and backward of a QK group of ``layers`` layers with our ops."""

    def new() -> Tensor:
        return torch.randn(batch, heads, length, dim, device=DEVICE, dtype=DTYPE)

    q, k, *values = (new().requires_grad_() for _ in range(layers + 2))
    grads = [new() for _ in range(layers)]

    def group() -> None:
        out, scores = ops.attention_with_scores(q, k, values[0], consumers=layers - 1, causal=True)
        outs = [out, *(ops.attention_from_scores(s, v) for s, v in zip(scores, values[1:], strict=True))]
        torch.autograd.grad(outs, (q, k, *values), grads)

    return seconds(group, repeats=2)


def piece_seconds(model: Any, batch: int, length: int) -> dict[str, float]:
    """Forward and backward of what stands before attention in a compiled layer of ours: norm, projections and RoPE of an owner
    (``project_qkv``), norm and the value projection of a consumer (``project_v``)."""
    layer = model.model.layers[-1]
    hidden = torch.randn(batch, length, model.config.hidden_size, device=DEVICE, dtype=DTYPE, requires_grad=True)
    positions = torch.arange(length, device=DEVICE)[None]
    with torch.no_grad():
        angles = model.model.rotary_emb(hidden, position_ids=positions)
    norm, attention = layer.input_layernorm.weight, layer.self_attn
    weights = {
        "project_qkv": [norm, attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight],
        "project_v": [norm, attention.v_proj.weight],
    }
    found = {}
    for name, leaves in weights.items():
        piece, more = getattr(layer.pieces, name), angles if name == "project_qkv" else ()

        def call(piece: Any = piece, more: Any = more, leaves: Any = leaves) -> None:
            out = piece(layer, hidden, *more)
            outs = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(outs, (hidden, *leaves), [torch.ones_like(x) for x in outs])

        found[name] = seconds(call)
    return found


class Report:
    """The rows of one claim; the file is written with every addition, so that a run that is cut off leaves what it had."""

    def __init__(self, path: Path | None, claim: str):
        self.path, self.rows = path, list[dict]()
        self.head = {
            "claim": claim,
            "machine": torch.cuda.get_device_name() if CUDA else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "effcore": effcore.__version__,
        }

    def add(self, rows: list[dict]) -> None:
        self.rows += rows
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.head | {"rows": self.rows}, indent=1))


def free(*, compiled: bool = True) -> None:
    """Gives a contender's memory back, and its ``compiled`` graphs."""
    gc.collect()
    if compiled:
        torch.compiler.reset()
    if CUDA:
        torch.cuda.empty_cache()


def arguments(name: str, description: str, claims: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.claims.{name}", description=description)
    parser.add_argument("claim", choices=claims)
    parser.add_argument("--quick", action="store_true", help="a toy model: shows that the script runs")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of measurement")
    parser.add_argument("--json", type=Path, help="write the numbers")
    return parser
