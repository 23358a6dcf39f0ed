"""SkipViT's speed: ViT-S/16 at 224², training steps and inference in images a second, against the compiled baseline.

Training runs under bfloat16 autocast, inference with bfloat16 weights, both as fast as the baseline can be had: compiled, with
fused attention and optimizer. Patches are embedded by the model's own convolution, with cuDNN free to choose how, and by the
matrix product that it is, as its stride is as long as its kernel. Each model has a process of its own, so that all compile at
once, but one at a time chooses its kernels; then they run in turns.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effcore
from benchmarks.claims import _kernels, _skipvit_profile
from benchmarks.claims._skipvit_training import logits
from benchmarks.timing import quartiles

# Steps of a stretch that is timed on a GPU, about 0.3 s. A stretch begins with an idle GPU, which waits for the first step's
# guards and launches: of five steps of inference that is 2 %.
STRETCH = {"infer": 40, "train": 12}
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


class PatchProduct(nn.Conv2d):
    """A convolution whose stride is its kernel, as one matrix product: [B, C, H, W] -> [B, O, H/k, W/k]."""

    def forward(self, x: Tensor) -> Tensor:
        (height, width), (k, l) = x.shape[2:], self.kernel_size
        patches = x.unflatten(3, (width // l, l)).unflatten(2, (height // k, k)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).movedim(-1, 1)


EMBEDDINGS: dict[str, type[nn.Conv2d]] = {"product": PatchProduct, "convolution": nn.Conv2d}


def embed_as(model: nn.Module, embedding: str) -> nn.Module:
    """The same model and parameters; only how its patches are embedded changes."""
    (convolution,) = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    convolution.__class__ = EMBEDDINGS[embedding]
    return model


class Contender:
    """A model to train, one to infer with, and a step of each."""

    def __init__(
        self, source: str, device: str, batch: int, compiled: bool, embedding: str, setting: tuple | None = None
    ):
        torch.manual_seed(0)
        self.device, self.cuda = device, device == "cuda"
        model, served = (embed_as(vit_small(source), embedding).to(device) for _ in range(2))
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


def name_of(setting: tuple | None) -> str:
    return "baseline" if setting is None else "drop {}, {} to {}".format(*setting)


def choose_alone(lock: Any) -> None:
    """The compiler times variants of each kernel at its first call. Beside others that do the same it chooses by chance: its
    GELU has taken 110 or 156 µs, which is as much as skipping gains. So one process at a time. (The first steps of others can
    still run meanwhile: compare the kernels of ``profile``.)
    """
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    choose = CachingAutotuner.autotune_to_one_config

    def alone(self: Any, *arguments: Any, **named: Any) -> Any:
        with lock:
            return choose(self, *arguments, **named)

    CachingAutotuner.autotune_to_one_config = alone


def _serve(connection: Any, lock: Any, source: str, device: str, *arguments: Any) -> None:
    """A contender's process: answers (kind, repeats) with seconds a step, and (kind, repeats, "kernels") with the time of each
    kernel a step, until None comes."""
    torch.backends.cudnn.benchmark = True
    if device == "cuda":
        choose_alone(lock)
    contender = Contender(source, device, *arguments)
    for kind, repeats, *kernels in iter(connection.recv, None):
        if kernels:
            contender.seconds(kind, 10 * repeats)  # the clocks of a GPU at work
            connection.send(_kernels.of_a_step(lambda n, kind=kind: contender.seconds(kind, n), repeats))
        else:
            connection.send(contender.seconds(kind, repeats))


def measure(
    source: str,
    device: str,
    *,
    batch: int,
    compiled: bool = True,
    settings: Sequence[tuple] = SETTINGS,
    embeddings: Sequence[str] = tuple(EMBEDDINGS),
    kinds: tuple[str, ...] = ("infer", "train"),
    rounds: int = 9,
    repeats: Mapping[str, int] = STRETCH,
    kernels: bool = False,
    keep: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """Alternating rounds of all contenders; ratios are medians of the rounds' ratios to the baseline of the same embedding. All
    settings with the first embedding; the first one with the others. With ``kernels``, also where their time goes."""
    plan = [(embeddings[0], setting) for setting in (None, *settings)]
    plan += [(embedding, setting) for embedding in embeddings[1:] for setting in (None, *settings[:1])]
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max((os.cpu_count() or 1) // len(plan), 1)))
    spawn = multiprocessing.get_context("spawn")
    lock = spawn.Lock()
    contenders = {}
    for embedding, setting in plan:
        ours, theirs = spawn.Pipe()
        arguments = (theirs, lock, source, device, batch, compiled, embedding, setting)
        spawn.Process(target=_serve, args=arguments, daemon=True).start()
        theirs.close()
        contenders[embedding, setting] = ours
    rows: list[dict] = []
    for kind in kinds:
        for connection in contenders.values():  # together: this compiles
            connection.send((kind, 3))
        for connection in contenders.values():
            connection.recv()
        print(f"{kind}: all are compiled; now in turns", file=sys.stderr, flush=True)
        times: dict[tuple, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, connection in contenders.items():
                connection.send((kind, repeats[kind]))
                times[name].append(connection.recv())
        for (embedding, setting), values in times.items():
            ratio = quartiles([b / t for b, t in zip(times[embedding, None], values, strict=True)])
            rate = batch / statistics.median(values)
            row = {
                "what": kind,
                "embedding": embedding,
                "model": name_of(setting),
                "steps": repeats[kind],
                "images_per_s": rate,
                "ratio": ratio.median,
                "ratio_quartiles": [ratio.q1, ratio.q3],
            }
            rows.append(row)
            print(
                f"{kind:<6} {embedding:<12} {row['model']:<20} {rate:9.1f} images/s  {ratio.median:.3f}x "
                f"({ratio.q1:.3f} to {ratio.q3:.3f})",
                flush=True,
            )
            keep(rows)
        for (embedding, setting), connection in contenders.items() if kernels else ():
            connection.send((kind, 3, "kernels"))
            taken = connection.recv()
            row = next(
                r for r in rows if (r["what"], r["embedding"], r["model"]) == (kind, embedding, name_of(setting))
            )
            row["microseconds"] = _skipvit_profile.summarise(taken)
            row["kernels"] = [f"{us:.1f} us in {launches:g}: {name}" for name, launches, us in taken]
            _skipvit_profile.print_row(row)
            keep(rows)
    for connection in contenders.values():
        connection.send(None)
    return rows
