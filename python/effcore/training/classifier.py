"""A text classifier trained on the samples that SwiftLearn keeps: ``effcore train swiftlearn``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PrinterCallback,
    set_seed,
)

from effcore.data.labelled import LabelledTexts, load_labelled
from effcore.errors import InputError, input_error
from effcore.files import staged, write_atomically
from effcore.methods.swiftlearn import SwiftLearnSampler
from effcore.training import models
from effcore.training.folder import RunConfig, RunFolder
from effcore.training.interruption import Interruption
from effcore.training.metrics import MetricsCallback
from effcore.training.metrics_file import Row, truncate_metrics
from effcore.training.recipe import Recipe
from effcore.training.run import Interrupted, explained, finished_run, resumed, step_of
from effcore.training.swiftlearn import SwiftLearnMixin
from effcore.training.trainer import CheckpointTrainer, training_arguments

Summary = dict[str, Any]


class TokenisedTexts(Dataset):
    """``{"input_ids": int64 [n], "labels": int}``; n at most ``length``."""

    def __init__(self, texts: list[tuple[str, int]], tokenizer: Any, length: int):
        self.tokens = tokenizer(
            [text for text, _ in texts], truncation=True, max_length=length, return_attention_mask=False
        )["input_ids"]
        self.labels = [label for _, label in texts]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.tensor(self.tokens[index]), "labels": self.labels[index]}

    @property
    def mean_length(self) -> float:
        return sum(map(len, self.tokens)) / max(len(self.tokens), 1)


@dataclass(frozen=True)
class PadRight:
    """Collates to the longest of the batch."""

    pad: int

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [item["input_ids"] for item in items]
        batch = {name: torch.tensor([item[name] for item in items]) for name in items[0] if name != "input_ids"}
        batch["input_ids"] = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad)
        lengths = torch.tensor([len(row) for row in ids])
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return batch


class ClassifierTrainer(SwiftLearnMixin, CheckpointTrainer):
    """Checkpoints without pickle; the sampler's order."""


def make_sampler(recipe: Recipe, samples: int) -> SwiftLearnSampler:
    """The sampler that a recipe's ``swiftlearn`` section describes. Raises InputError for a setting out of range."""
    try:
        return SwiftLearnSampler(samples, **asdict(recipe.swiftlearn), seed=recipe.training.seed)
    except ValueError as error:
        raise input_error(error, "swiftlearn") from error


def train_classifier(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    against: Path | None = None,
    listener: Callable[[Row], None] | None = None,
    total: Callable[[int, int], None] | None = None,
) -> Summary:
    """Trains, and writes the run folder ``out``; arguments and errors as in :func:`effcore.training.run.train`."""
    folder = RunFolder(out)
    baseline = finished_run(against, "accuracy").summary("accuracy") if against is not None else None
    last: Path | None = None
    if resume:
        config, last = resumed(folder, config.method)
        finished = folder.summary("accuracy")
        if finished is not None:
            return finished
    recipe, settings = config.recipe, config.recipe.training
    make_sampler(recipe, 10)  # a wrong setting is said before anything is read
    arguments = training_arguments(settings, out, shares=False)
    arguments.num_train_epochs, arguments.max_steps, arguments.prediction_loss_only = 1, -1, False
    if not resume and arguments.should_save:
        folder.check_free(overwrite=overwrite)
    data = load_labelled(
        config.data,
        text_field=recipe.data.text_field,
        label_field=recipe.data.label_field,
        validation_fraction=recipe.data.validation_fraction,
    )
    if resume and data.fingerprint != config.corpus:
        raise InputError(f"--resume {out}: the texts in {data.name} have changed since the run began")
    model, tokenizer = _model(config, data)
    training = TokenisedTexts(data.train, tokenizer, recipe.data.length)
    validation = TokenisedTexts(data.validation, tokenizer, recipe.data.length)
    sampler = make_sampler(recipe, len(training))
    if not resume and arguments.should_save:
        with explained(folder):
            folder.create(replace(config, corpus=data.fingerprint), overwrite=overwrite)
    interruption = Interruption()
    per_step = settings.batch_size * settings.accumulation * arguments.world_size
    with explained(folder):
        rows = truncate_metrics(folder.metrics_file, step_of(last)) if arguments.should_save else []
        metrics = MetricsCallback(
            folder.metrics_file, round(per_step * training.mean_length), lambda: {}, rows, listener
        )
        trainer = ClassifierTrainer(
            model=model,
            args=arguments,
            sampler=sampler,
            train_dataset=training,
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=PadRight(tokenizer.pad_token_id),
            compute_metrics=_accuracy,
            callbacks=[metrics, interruption],
        )
        trainer.remove_callback(PrinterCallback)
        if total is not None:
            total(step_of(last), -(-len(sampler) // per_step))
        began = time.perf_counter()
        with interruption.listening(), models.quiet_transformers():
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        wall = time.perf_counter() - began
        if interruption.stopped_at is not None:
            raise Interrupted(interruption.stopped_at)
        barrier = trainer.accelerator.wait_for_everyone
        with staged(out, is_main=arguments.should_save, barrier=barrier) as staging, models.quiet_transformers():
            trainer.save_model(str(staging / "model"))
        if not arguments.should_save:
            return {}
        summary = _summary(config, folder, data, sampler, wall)
        write_atomically(folder.summary_file, json.dumps(summary, indent=1))
        write_atomically(folder.report_file, _report(summary, baseline))
    return summary


def _model(config: RunConfig, data: LabelledTexts) -> tuple[Any, Any]:
    """A checkpoint with a fresh head, or a fresh LLaMA on bytes that classifies by its last token."""
    tokenizer = models.load_tokenizer(config.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_seed(config.recipe.training.seed)
    classes: dict[str, Any] = {
        "num_labels": len(data.classes),
        "id2label": dict(enumerate(data.classes)),
        "label2id": {name: i for i, name in enumerate(data.classes)},
    }
    if config.model is None:
        made = config.recipe.model
        return LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=made.hidden_size,
                intermediate_size=made.mlp_size,
                num_hidden_layers=made.layers,
                num_attention_heads=made.heads,
                num_key_value_heads=made.kv_heads,
                max_position_embeddings=made.max_length,
                pad_token_id=tokenizer.pad_token_id,
                **classes,
            )
        ), tokenizer
    try:
        with models.quiet_transformers():
            model = AutoModelForSequenceClassification.from_pretrained(
                config.model, dtype=torch.float32, ignore_mismatched_sizes=True, **classes
            )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{config.model}: cannot be loaded as a classifier ({' '.join(str(error).split())[:300]})"
        ) from error
    model.config.pad_token_id = tokenizer.pad_token_id
    models.check_length(model, config.recipe.data.length)
    return model, tokenizer


def _accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def _summary(
    config: RunConfig, folder: RunFolder, data: LabelledTexts, sampler: SwiftLearnSampler, wall: float
) -> Summary:
    rows = folder.metrics()
    trained = [row for row in rows if row["kind"] == "train"]
    validated = [row for row in rows if row["kind"] == "validation"]
    settings = asdict(config.recipe.swiftlearn)
    return {
        "method": config.method,
        "title": "all samples" if sampler.keep == 1 else f"SwiftLearn, keep {sampler.keep:g}, {sampler.select}",
        "accuracy": validated[-1]["accuracy"],
        "validation_loss": validated[-1]["loss"],
        "training_loss": trained[-1]["loss"],
        "steps": trained[-1]["step"],
        "samples": sampler.samples,
        "samples_trained_on": len(sampler),
        "speedup_ceiling": sampler.speedup_ceiling,
        "seconds": trained[-1]["seconds"],
        "wall_seconds": wall,  # with validation and checkpoints, of this process's part where the run was resumed
        "classes": len(data.classes),
        "data": data.name,
        "settings": settings,
        "model": str(folder.model),
    }


def _report(summary: Summary, baseline: Summary | None) -> str:
    runs = [run for run in (baseline, summary) if run is not None]
    lines = [
        f"# {summary['title']}",
        "",
        "| run | accuracy | samples trained on | training seconds | speed-up | ceiling |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for run in runs:
        faster = f"{runs[0]['seconds'] / max(run['seconds'], 1e-9):.2f}×" if run is not runs[0] else ""
        lines.append(
            f"| {run['title']} | {run['accuracy']:.2%} | {run['samples_trained_on']:,} | {run['seconds']:.1f} | {faster} | "
            f"{run['speedup_ceiling']:.2f}× |"
        )
    lines += [
        "",
        f"{summary['samples']:,} texts of {summary['data']}, {summary['classes']} classes. Training seconds leave out",
    ]
    lines += ["validation and checkpoints. The ceiling is E / (2 + (E − 2) · keep), where nothing but samples costs."]
    return "\n".join(lines) + "\n"
