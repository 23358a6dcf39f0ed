"""SkipViT's speed: ViT-S/16 at 224², training steps and inference in images a second, against the compiled baseline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import effcore

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


def _logits(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


class Contender:
    """A model, its optimizer, and a step of each kind."""

    def __init__(self, name: str, source: str, device: str, batch: int, compiled: bool, setting: tuple | None = None):
        torch.manual_seed(0)
        self.name = name
        model = vit_small(source).to(device)
        if setting is not None:
            effcore.skip_tokens(model, *setting)
        self.model = torch.compile(model, dynamic=False) if compiled else model
        fused = {"fused": True} if device == "cuda" else {}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **fused)
        self.images = torch.randn(batch, 3, 224, 224, device=device)
        self.labels = torch.randint(0, 1000, (batch,), device=device)
        self.autocast: Callable[[], Any] = lambda: torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def train(self) -> None:
        self.model.train()
        with self.autocast():
            loss = F.cross_entropy(_logits(self.model(self.images)), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def infer(self) -> None:
        self.model.eval()
        with torch.no_grad(), self.autocast():
            self.model(self.images)


def _seconds(step: Callable[[], None], device: str, repeats: int) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def measure(
    source: str,
    device: str,
    *,
    batch: int,
    compiled: bool = True,
    settings: list[tuple] | None = None,
    rounds: int = 9,
    repeats: int = 5,
    deadline: float = float("inf"),
) -> list[dict]:
    """Alternating rounds of all contenders; ratios are medians of the rounds' ratios. Past ``deadline`` (time.monotonic)
    nothing new begins."""
    contenders = [Contender("baseline", source, device, batch, compiled)]
    rows = []
    for setting in settings or SETTINGS:
        if time.monotonic() > deadline:
            break
        contenders.append(
            Contender(f"drop {setting[0]}, {setting[1]} to {setting[2]}", source, device, batch, compiled, setting)
        )
    for kind in ("train", "infer"):
        if time.monotonic() > deadline:
            break
        times: dict[str, list[float]] = {c.name: [] for c in contenders}
        for c in contenders:
            for _ in range(3):
                getattr(c, kind)()
        for _ in range(rounds):
            for c in contenders:
                times[c.name].append(_seconds(getattr(c, kind), device, repeats))
        for name, values in times.items():
            ratio = statistics.median(b / t for b, t in zip(times["baseline"], values, strict=True))
            rows.append(
                {"what": kind, "model": name, "images_per_s": batch / statistics.median(values), "ratio": ratio}
            )
            print(f"{kind:<6} {name:<24} {rows[-1]['images_per_s']:9.1f} images/s  {ratio:.3f}x", flush=True)
    return rows
