"""SkipViT's speed: ViT-S/16 at 224², training steps and inference in images a second, against the compiled baseline.

Training runs under bfloat16 autocast, inference with bfloat16 weights, both as fast as the baseline can be had: compiled, with
fused attention and optimizer, and cuDNN free to choose how to embed the patches. Each model has a process of its own, so that
all compile at once; then they run in turns.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import effcore
from benchmarks.claims._skipvit_training import logits

# (drop, leave, rejoin)
SETTINGS = [(0.55, 6, 10), (0.25, 6, 10), (0.75, 6, 10), (0.55, 6, 11)]


def vit_small(source: str) -> nn.Module:
    """ViT-S/16 of 12 blocks, 1000 classes: timm's, or Hugging Face's of the same shape."""
    if source == "timm":
        import timm

        return timm.create_model("vit_small_patch16_224", num_classes=1000)
    import transformers

    config = transformers.ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, num_labels=1000
    )
    return transformers.ViTForImageClassification(config)


class Contender:
    """A model to train, one to infer with, and a step of each."""

    def __init__(self, source: str, device: str, batch: int, compiled: bool, setting: tuple | None = None):
        torch.manual_seed(0)
        self.device, self.cuda = device, device == "cuda"
        model, served = (vit_small(source).to(device) for _ in range(2))
        if setting is not None:
            effcore.skip_tokens(model, *setting)
            effcore.skip_tokens(served, *setting)
        dtype = torch.bfloat16 if self.cuda else torch.float32
        compile_ = (lambda m: torch.compile(m, dynamic=False)) if compiled else (lambda m: m)
        self.model, self.served = compile_(model.train()), compile_(served.to(dtype).eval())
        fused = {"fused": True} if self.cuda else {}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **fused)
        self.images = torch.randn(batch, 3, 224, 224, device=device)
        self.served_images = self.images.to(dtype)
        self.labels = torch.randint(0, 1000, (batch,), device=device)

    def train(self) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.cuda):
            loss = F.cross_entropy(logits(self.model(self.images)), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def infer(self) -> None:
        with torch.no_grad():
            self.served(self.served_images)

    def seconds(self, kind: str, repeats: int) -> float:
        step: Callable[[], None] = getattr(self, kind)
        synchronize: Callable[[], None] = torch.cuda.synchronize if self.cuda else lambda: None
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        synchronize()
        return (time.perf_counter() - start) / repeats


def _serve(connection: Any, *arguments: Any) -> None:
    """A contender's process: answers (kind, repeats) with seconds a step, until None comes."""
    torch.backends.cudnn.benchmark = True
    contender = Contender(*arguments)
    for kind, repeats in iter(connection.recv, None):
        connection.send(contender.seconds(kind, repeats))


def measure(
    source: str,
    device: str,
    *,
    batch: int,
    compiled: bool = True,
    settings: list[tuple] | None = None,
    kinds: tuple[str, ...] = ("train", "infer"),
    rounds: int = 9,
    repeats: int = 5,
) -> list[dict]:
    """Alternating rounds of all contenders; ratios are medians of the rounds' ratios."""
    plan: dict[str, tuple | None] = {"baseline": None}
    plan |= {f"drop {s[0]}, {s[1]} to {s[2]}": s for s in settings or SETTINGS}
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max((os.cpu_count() or 1) // len(plan), 1)))
    spawn = multiprocessing.get_context("spawn")
    contenders = {}
    for name, setting in plan.items():
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs, source, device, batch, compiled, setting), daemon=True)
        process.start()
        theirs.close()
        contenders[name] = ours
    rows = []
    for kind in kinds:
        for connection in contenders.values():  # together: this compiles
            connection.send((kind, 3))
        for connection in contenders.values():
            connection.recv()
    print("all are compiled; now in turns", file=sys.stderr, flush=True)
    for kind in kinds:
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, connection in contenders.items():
                connection.send((kind, repeats))
                times[name].append(connection.recv())
        for name, values in times.items():
            ratio = statistics.median(b / t for b, t in zip(times["baseline"], values, strict=True))
            rows.append(
                {"what": kind, "model": name, "images_per_s": batch / statistics.median(values), "ratio": ratio}
            )
            print(f"{kind:<6} {name:<24} {rows[-1]['images_per_s']:9.1f} images/s  {ratio:.3f}x", flush=True)
    for connection in contenders.values():
        connection.send(None)
    return rows
