"""SkipViT's accuracy on cluttered digits, at equal steps, beside no dropping, random dropping and merging (ToMe).

The task: which digit stands among pieces of other digits in a 64² picture (:mod:`effcore.data.cluttered_digits`). Tuned for the
model without dropping alone: with 8 pieces a picture it got 87 %, with 4 91 % after 3,000 steps of 256.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effcore
from benchmarks.claims._skipvit_training import Run, accuracy, train_together
from effcore.data.cluttered_digits import ClutteredDigits
from effcore.methods import skipvit, vit_blocks
from effcore.training.images import small_vit

IMAGES = 20_000  # of the test
DROP, LEAVE, REJOIN = 0.55, 3, 5  # of 6 blocks: the same halves as 6 and 10 of 12
PATCH, KEPT = 8, 64 - int(DROP * 64)  # of the 64 patches of a picture


def merge_most_alike(x: Tensor, patches: int) -> Tensor:
    """ToMe's step (arXiv 2210.09461) without weights: patches join the one most like them until `patches` are left, or half."""
    with torch.no_grad():
        metric = F.normalize(x, dim=-1)
        a, b = metric[:, 1::2], metric[:, 2::2]
        count = min(max(x.shape[1] - 1 - patches, 0), a.shape[1])
        best, to = (a @ b.mT).max(-1)
        order = best.argsort(1, descending=True)
    a, b = x[:, 1::2], x[:, 2::2]
    wide = [
        i[..., None].expand(-1, -1, x.shape[2])
        for i in (order[:, :count], order[:, count:], to.gather(1, order[:, :count]))
    ]
    b = b.scatter_reduce(1, wide[2], a.gather(1, wide[0]), "mean")
    return torch.cat([x[:, :1], a.gather(1, wide[1]), b], 1)


def _with_merging(model: nn.Module) -> nn.Module:
    """ToMe before the same blocks, down to as many patches as SkipViT keeps, in two steps: one merges half of them at most.
    What was merged stays merged: nothing rejoins."""
    for block in list(vit_blocks.architecture(model).blocks.children())[LEAVE:REJOIN]:
        block.register_forward_pre_hook(lambda _, args: (merge_most_alike(args[0], KEPT), *args[1:]))
    return model


def _with_skipping(model: nn.Module, scores: str = "class") -> nn.Module:
    return effcore.skip_tokens(model, DROP, LEAVE, REJOIN, scores=scores)


METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "no dropping": lambda model: model,
    "SkipViT": _with_skipping,
    "random dropping": lambda model: _with_skipping(model, "random"),
    "merging (ToMe)": _with_merging,
}


def vit(source: str, data: ClutteredDigits) -> nn.Module:
    """Six blocks of width 96 on patches of 8²: timm's, or Hugging Face's of the same shape."""
    if source == "hf":
        return small_vit(data, patch=PATCH)
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=data.size, patch_size=PATCH, in_chans=data.channels, num_classes=data.classes,
        embed_dim=96, depth=6, num_heads=3, mlp_ratio=2,
    )  # fmt: skip


def measure(
    source: str,
    device: str,
    steps: int,
    seeds: int,
    batch: int,
    picture: Path | None,
    methods: Iterable[str] = tuple(METHODS),
    keep: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """All methods begin after a tenth of the steps without (the paper's warm-up). ``keep`` gets the rows as they come."""
    torch.set_float32_matmul_precision("high")
    training, test = (ClutteredDigits(split, device=device) for split in ("train", "test"))
    runs = []
    for name in methods:
        convert = METHODS[name]
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = vit(source, training)
            runs.append(Run(name, model, seed, {steps // 10: partial(convert, model)}))

    def show(step: int, losses: list[float]) -> None:
        print(f"step {step} of {steps}: loss {min(losses):.3f} to {max(losses):.3f}", file=sys.stderr, flush=True)

    train_together(runs, training, steps=steps, batch=batch, learning_rate=1e-3, device=device, listener=show)
    rows: list[dict] = []
    exam = test.sample(IMAGES, torch.Generator(device=device).manual_seed(10_000))  # the same for all
    for name in methods:
        of_method = [run for run in runs if run.name == name]
        found = [accuracy(run.model, *exam) for run in of_method]
        row = {"method": name, "accuracy": statistics.mean(found), "runs": found}
        row["spread"] = statistics.stdev(found) if len(found) > 1 else 0.0
        print(f"{name:<18} {row['accuracy']:7.2%} ± {row['spread']:.2%}", end="", flush=True)
        if name == "SkipViT":
            for run in of_method:
                skipvit.skipping(run.model).inference = False
            row["accuracy_on_all_patches"] = statistics.mean(accuracy(run.model, *exam) for run in of_method)
            print(f"; on all patches {row['accuracy_on_all_patches']:7.2%}", end="")
        print(flush=True)
        rows.append(row)
        keep(rows)
    skipping = next((run.model for run in runs if run.name == "SkipViT"), None)
    if picture is not None and skipping is not None:
        draw(picture, skipping, test, device)
    return rows


def draw(path: Path, model: nn.Module, data: ClutteredDigits, device: str) -> None:
    """Eight pictures, and below each the patches that the middle blocks saw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    images, labels = data.sample(8, torch.Generator(device=device).manual_seed(7))
    (skipped,) = skipvit.skipped_patches(model.eval(), images)
    images = images.cpu()
    side = int(skipped.shape[1] ** 0.5)
    seen = F.interpolate((~skipped).view(-1, 1, side, side).float().cpu(), size=images.shape[-1])[:, 0].numpy()
    figure, axes = pyplot.subplots(2, 8, figsize=(12, 3.3))
    for i in range(8):
        picture = images[i, 0].numpy() * 0.5 + 0.5
        axes[0, i].imshow(picture, cmap="gray")
        axes[0, i].set_title(str(int(labels[i])))
        axes[1, i].imshow(picture * seen[i] + 0.85 * (1 - seen[i]), cmap="gray", vmin=0, vmax=1)
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(f"Patches that skip blocks {LEAVE} to {REJOIN - 1} are blank")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
