"""SkipViT's accuracy on cluttered digits, at equal steps, beside no dropping, random dropping and merging (ToMe).

The task: which digit stands among pieces of other digits in a 64² picture (:mod:`effcore.data.cluttered_digits`).
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effcore
from effcore.data.cluttered_digits import ClutteredDigits
from effcore.methods import skipvit
from effcore.training.images import accuracy, small_vit, train_classifier

DROP, LEAVE, REJOIN = 0.55, 3, 5  # of 6 blocks: the same halves as 6 and 10 of 12


def merge_most_alike(x: Tensor, count: int) -> Tensor:
    """ToMe's step (arXiv 2210.09461) without weights: `count` patches join the one that is most like them."""
    with torch.no_grad():
        metric = F.normalize(x, dim=-1)
        a, b = metric[:, 1::2], metric[:, 2::2]
        count = min(count, a.shape[1])
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
    """ToMe in the same blocks. What was merged stays merged: nothing rejoins."""
    for block in model.vit.layers[LEAVE:REJOIN]:  # type: ignore[union-attr, index]
        block.register_forward_pre_hook(
            lambda _, args: (merge_most_alike(args[0], int(DROP * (args[0].shape[1] - 1))), *args[1:])
        )
    return model


METHODS = {
    "no dropping": lambda data: small_vit(data),
    "SkipViT": lambda data: effcore.skip_tokens(small_vit(data), DROP, LEAVE, REJOIN),
    "random dropping": lambda data: effcore.skip_tokens(small_vit(data), DROP, LEAVE, REJOIN, scores="random"),
    "merging (ToMe)": lambda data: _with_merging(small_vit(data)),
}


def measure(device: str, steps: int, seeds: int, picture: Path | None) -> list[dict]:
    training, test = ClutteredDigits("train"), ClutteredDigits("test")
    rows = []
    for name, make in METHODS.items():
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = make(training)
            train_classifier(model, training, steps=steps, seed=seed, device=device)
            found.append(accuracy(model, test, device=device))
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        rows.append({"method": name, "accuracy": statistics.mean(found), "spread": spread, "runs": found})
        print(f"{name:<18} {statistics.mean(found):7.2%} ± {spread:.2%}", flush=True)
        if name == "SkipViT" and picture is not None:
            draw(picture, model, test, device)
    return rows


def draw(path: Path, model: nn.Module, data: ClutteredDigits, device: str) -> None:
    """Eight pictures, and below each the patches that the middle blocks saw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    images, labels = data.sample(8, torch.Generator().manual_seed(7))
    (skipped,) = skipvit.skipped_patches(model, images.to(device))
    side = int(skipped.shape[1] ** 0.5)
    seen = (~skipped).view(-1, 1, side, side).float().cpu()
    seen = F.interpolate(seen, size=images.shape[-1])[:, 0]
    figure, axes = pyplot.subplots(2, 8, figsize=(12, 3.3))
    for i in range(8):
        picture = images[i, 0] * 0.5 + 0.5
        axes[0, i].imshow(picture, cmap="gray")
        axes[0, i].set_title(str(int(labels[i])))
        axes[1, i].imshow(picture * seen[i] + 0.85 * (1 - seen[i]), cmap="gray", vmin=0, vmax=1)
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(f"Patches that skip blocks {LEAVE} to {REJOIN - 1} are blank")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
