"""FlowHN's strategies at equal tokens of a real text: validation loss on the way, and a plot of it against speed.

AdamW as in the paper: 3e-4, betas 0.9 and 0.95, decay 0.1, 10 % warm-up, cosine; bfloat16 autocast over float32 weights. Bytes
are the tokens, so that a loss is nats a byte. A strategy that the file already holds is not trained again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims import _hybrids as hybrids
from benchmarks.claims import _sharing as sharing

POINTS = 8  # of a training at which the validation loss is taken


def _held(path: Path | None) -> list[dict]:
    return json.loads(path.read_text())["rows"] if path is not None and path.is_file() else []


@torch.no_grad()
def _validation(model: Any, held_out: Tensor, batch: int) -> float:
    model.eval()
    losses = []
    with torch.autocast(sharing.DEVICE, torch.bfloat16, enabled=sharing.CUDA):
        for part in held_out.split(batch):
            losses.append(model(input_ids=part, labels=part, use_cache=False).loss.item())
    model.train()
    return statistics.mean(losses)


def _train(model: Any, windows: Any, held_out: Tensor, batch: int, steps: int) -> tuple[list[tuple[int, float]], float]:
    """(step, validation loss) on the way, and the seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=sharing.CUDA)
    warm = max(steps // 10, 1)
    parts: list[Any] = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, warm),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - warm, 1)),
    ]
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [warm])
    begin, curve = time.perf_counter(), []
    model.train()
    for i in range(steps):
        texts = [torch.as_tensor(windows[i * batch + j]["input_ids"]) for j in range(batch)]
        ids = torch.stack(texts).to(sharing.DEVICE)
        with torch.autocast(sharing.DEVICE, torch.bfloat16, enabled=sharing.CUDA):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if (i + 1) % max(steps // POINTS, 1) == 0 or i + 1 == steps:
            curve.append((i + 1, _validation(model, held_out, batch)))
    return curve, time.perf_counter() - begin


def loss(
    report: sharing.Report, size: str, batch: int, length: int, steps: int, seed: int, models: Sequence[str]
) -> list[dict]:
    """Trains those of ``models`` whose rows the report's file does not hold yet; all of its rows, old and new."""
    from effcore.data import PackedTokens, byte_tokenizer, load_corpus

    tokenizer = byte_tokenizer()
    corpus = load_corpus(None, tokenizer)
    validation = PackedTokens(corpus.validation, length)
    texts = [torch.as_tensor(validation[i]["input_ids"]) for i in range(min(len(validation), 8 * batch))]
    held_out = torch.stack(texts).to(sharing.DEVICE)
    windows = PackedTokens(corpus.train, length, samples=steps * batch, seed=seed)
    setting = {"what": "loss", "size": size, "steps": steps, "batch": batch, "length": length, "seed": seed}
    report.add(_held(report.path))
    print(f"validation loss after {steps} steps of {batch} x {length} bytes of {corpus.name}, {size}", flush=True)
    for strategy, name in hybrids.STRATEGIES.items():
        wanted = (setting | {"model": name}).items()
        if strategy not in models or any(wanted <= row.items() for row in report.rows):
            continue
        torch.manual_seed(seed)
        model: Any = hybrids.flowhn(strategy, size, length, sharing.DEVICE, torch.float32)
        model.resize_token_embeddings(len(tokenizer))
        hybrids.compiled(model)
        curve, seconds = _train(model, windows, held_out, batch, steps)
        row = setting | {"model": name, "tokens": steps * batch * length, "curve": curve, "seconds": seconds}
        row |= {"validation_loss": curve[-1][1]}
        print(f"  {name:<26} {row['validation_loss']:.4f} nats a byte, {seconds:.0f} s", flush=True)
        report.add([row])
        del model
        sharing.free()
    return report.rows


def plot(path: Path, losses: list[dict], speeds: list[dict]) -> None:
    """Validation loss against training speed, the paper's accuracies against its own, and the curves of the losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (ours, paper, curves) = pyplot.subplots(1, 3, figsize=(14, 4))
    rate = {row["model"]: row["tokens/s"] for row in speeds}
    for i, name in enumerate(hybrids.STRATEGIES.values()):
        runs = [row for row in losses if row["model"] == name]
        for n, row in enumerate(runs):
            curves.plot(*zip(*row["curve"], strict=True), color=f"C{i}", label=name if n == 0 else None)
        if name in rate and runs:
            mean = statistics.mean(row["validation_loss"] for row in runs)
            ours.plot(rate[name] / 1e3, mean, "o", color=f"C{i}", label=name)
        tokens, _, accuracy = hybrids.PAPER[name]
        paper.plot(tokens / 1e3, accuracy, "o", color=f"C{i}", label=name)
    ours.set(title="ours", ylabel="validation loss, nats a byte")
    ours.invert_yaxis()  # better is up, as beside it
    paper.set(title="the paper, 1B", ylabel="mean accuracy, %")
    for axes in (ours, paper):
        axes.set(xlabel="training, thousand tokens a second")
    curves.set(title="ours", xlabel="steps", ylabel="validation loss, nats a byte", yscale="log")
    paper.legend(fontsize=8)
    for axes in (ours, paper, curves):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
