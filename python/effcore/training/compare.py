"""Finished runs side by side: their numbers, and the cost of a step of each measured again in turns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from effcore.data import PackedTokens, load_corpus
from effcore.errors import InputError
from effcore.files import staged
from effcore.training import models
from effcore.training.folder import RunFolder
from effcore.training.report import Summary
from effcore.training.run import write_report
from effcore.training.speed import step_costs


def compare_runs(paths: Sequence[Path], *, rounds: int = 5, out: Path | None = None) -> list[Summary]:
    """The summaries of finished runs, the baseline first, with forward and backward times taken in turns.

    Args:
        rounds: steps that are timed for each model.
        out: where ``report.md`` and ``plots/`` go; None writes nothing.

    Raises:
        InputError: ``out`` is a file; not a finished run, or runs on windows of different lengths, whose numbers do not
            compare.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: not a folder")
    folders = [RunFolder(path) for path in paths]
    summaries: list[Summary] = []
    for folder in folders:
        summary = folder.summary()
        if summary is None:
            raise InputError(f"{folder.path}: no finished run here (no summary.json)")
        summaries.append(summary)
    configs = [folder.config() for folder in folders]
    first = configs[0].recipe
    for folder, config in zip(folders, configs, strict=True):
        if (config.recipe.data.length, config.data) != (first.data.length, configs[0].data):
            raise InputError(f"{folder.path}: trained on other text or another data.length than {folders[0].path}")
    tokenizer = models.load_tokenizer(folders[0].model)
    corpus = load_corpus(
        configs[0].data, tokenizer, validation_fraction=first.data.validation_fraction, text_field=first.data.text_field
    )
    windows = PackedTokens(corpus.validation, first.data.length)
    samples = [windows[i % len(windows)] for i in range(first.training.batch_size)]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    loaded = {str(folder.path): models.load_model(folder.path, dtype=torch.float32)[0] for folder in folders}
    if torch.cuda.is_available():
        loaded = {name: model.cuda() for name, model in loaded.items()}
    costs = step_costs(loaded, batch, rounds=rounds, bfloat16=first.training.precision == "bfloat16")
    for folder, summary in zip(folders, summaries, strict=True):
        cost = costs[str(folder.path)]
        summary["forward_ms"], summary["backward_ms"] = 1e3 * cost.forward_seconds, 1e3 * cost.backward_seconds
        summary["backward_share"] = cost.backward_share
    if out is not None:
        with staged(out) as place:
            write_report(folders, RunFolder(place), summaries)
    return summaries
