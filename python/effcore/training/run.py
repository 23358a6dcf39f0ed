"""A training run from start to end: model, data, schedule, Trainer, and what it leaves in its folder."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import Subset
from transformers import PrinterCallback, TrainerState, default_data_collator

import effcore
from effcore.data import Corpus, PackedTokens, load_corpus
from effcore.data.packing import spread
from effcore.errors import InputError, RunError, disk_is_full, input_error
from effcore.files import staged, write_atomically
from effcore.methods.echo_llama import ECHOSchedule
from effcore.methods.epas import EPASSchedule, StaticSchedule
from effcore.methods.sharing import SharingSchedule
from effcore.training import models, plots
from effcore.training.checkpoint import COMPLETE, checkpoints
from effcore.training.folder import RunConfig, RunFolder
from effcore.training.interruption import Interruption
from effcore.training.metrics import MetricsCallback
from effcore.training.metrics_file import Row, truncate_metrics
from effcore.training.recipe import Recipe
from effcore.training.report import Summary, report, title
from effcore.training.speed import step_costs
from effcore.training.trainer import SharingTrainer, training_arguments

METHODS = ("baseline", "epas", "echo", "flowhn")


class Interrupted(Exception):
    """The user stopped the run; ``step`` has a checkpoint."""

    def __init__(self, step: int):
        super().__init__(f"interrupted after step {step}")
        self.step = step


def train(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    against: Path | None = None,
    listener: Callable[[Row], None] | None = None,
    total: Callable[[int, int], None] | None = None,
) -> Summary:
    """Trains, and writes the run folder ``out``.

    Args:
        config: where ``resume`` is set, only its method counts; the rest is read from the folder.
        against: the folder of a finished run (the baseline) for the report and the plots.
        listener: is given each row of metrics.
        total: is told the first and the last step, before training begins.

    Returns:
        The content of ``summary.json``.

    Raises:
        InputError: something that the user gave is wrong.
        RunError: the disk is full, or the loss is not a number. The last checkpoint is intact.
        Interrupted: Ctrl-C; a checkpoint was written.
    """
    folder = RunFolder(out)
    baseline = finished_run(against) if against is not None else None
    last: Path | None = None
    if resume:
        config, last = resumed(folder, config.method)
        finished = folder.summary()
        if finished is not None:
            return finished
    recipe, settings = config.recipe, config.recipe.training
    if config.method == "flowhn" and recipe.data.separate_documents:
        raise InputError("data.separate_documents: a FlowHN model reads each window as one text; leave it out")
    arguments = training_arguments(settings, out, shares=config.method in ("epas", "echo") or config.model is not None)
    if not resume and arguments.should_save:
        folder.check_free(overwrite=overwrite)
    tokenizer = models.load_tokenizer(config.model)
    with explained(folder), arguments.main_process_first():
        corpus = load_corpus(
            config.data,
            tokenizer,
            validation_fraction=recipe.data.validation_fraction,
            text_field=recipe.data.text_field,
        )
    if resume and corpus.fingerprint != config.corpus:
        raise InputError(f"--resume {out}: the text in {corpus.name} has changed since the run began")
    training, validation = _datasets(corpus, recipe, arguments.world_size, tokenizer)
    model, schedule = _model_and_schedule(config, tokenizer)
    if not resume and arguments.should_save:
        with explained(folder):
            folder.create(replace(config, corpus=corpus.fingerprint), overwrite=overwrite)

    precision = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    tokens_per_step = settings.batch_size * settings.accumulation * arguments.world_size * recipe.data.length
    interruption = Interruption()
    with explained(folder):
        rows = truncate_metrics(folder.metrics_file, step_of(last)) if arguments.should_save else []
        metrics = MetricsCallback(
            folder.metrics_file, tokens_per_step, lambda: models.describe(model, precision), rows, listener
        )
        trainer = SharingTrainer(
            model=model,
            args=arguments,
            train_dataset=training,
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=default_data_collator,  # the tokenizer's own would add a mask of ones, and lose the documents
            callbacks=[metrics, interruption, *([schedule.callback()] if schedule is not None else [])],
            extra_loss=schedule.extra_loss if isinstance(schedule, ECHOSchedule) else None,
        )
        trainer.remove_callback(PrinterCallback)
        if total is not None:
            total(step_of(last), settings.steps)
        with interruption.listening(), models.quiet_transformers():
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if interruption.stopped_at is not None:
            raise Interrupted(interruption.stopped_at)
        if isinstance(schedule, ECHOSchedule) and recipe.echo.drop_unused and not trainer.is_fsdp_enabled:
            schedule.finish(model)
        with (
            staged(out, is_main=arguments.should_save, barrier=trainer.accelerator.wait_for_everyone) as staging,
            models.quiet_transformers(),
        ):
            trainer.save_model(str(staging / "model"))
        batch = _batch(
            training, settings.batch_size
        )  # by all processes: a sharded model runs in all of them or not at all
        cost = step_costs({"run": trainer.model}, batch, rounds=3, bfloat16=settings.precision == "bfloat16")["run"]
        if not arguments.should_save:
            return {}
        summary = _summary(config, folder, corpus, model, models.describe(model, precision))
        summary |= {
            "forward_ms": 1e3 * cost.forward_seconds,
            "backward_ms": 1e3 * cost.backward_seconds,
            "backward_share": cost.backward_share,
        }
        write_atomically(folder.summary_file, json.dumps(summary, indent=1))
        write_report([run for run in (baseline, folder) if run is not None], folder)
    return summary


def write_report(runs: list[RunFolder], target: RunFolder, summaries: list[Summary] | None = None) -> None:
    """``report.md`` and ``plots/`` of finished runs, the baseline first, into ``target``."""
    found = [summary for run in runs if (summary := run.summary()) is not None]
    names = plots.draw([(s["title"], run.metrics()) for s, run in zip(found, runs, strict=True)], target.plots)
    write_atomically(target.report_file, report(summaries or found, names))


def make_schedule(method: str, recipe: Recipe, layers: int) -> SharingSchedule | None:
    """The schedule that a recipe describes for a model of so many layers; None for the baseline.

    Raises:
        InputError: a setting that does not fit the model.
    """
    steps = recipe.training.steps
    layout = {"epas": recipe.epas.layout, "echo": recipe.echo.layout}.get(method)
    if layout is not None:
        return StaticSchedule(str(models.parse_layout(layout, layers)))
    try:
        if method == "epas":
            epas = recipe.epas
            return EPASSchedule.plan(
                layers,
                steps,
                max_shared=epas.max_shared,
                layers_per_switch=epas.layers_per_switch,
                switch_every=epas.switch_every,
                first_switch=epas.first_switch,
                restart_steps=epas.restart_steps,
                restart_from=epas.restart_from,
            )
        if method == "echo":
            echo = recipe.echo
            return ECHOSchedule.plan(
                layers,
                steps,
                final_start=echo.start,
                steps_per_stage=echo.steps_per_stage,
                first_stage=echo.first_stage,
                distillation=echo.distillation,
            )
    except ValueError as error:
        raise input_error(error, method) from error
    return None


def _model_and_schedule(config: RunConfig, tokenizer: Any) -> tuple[Any, SharingSchedule | None]:
    recipe = config.recipe
    if config.method == "flowhn":
        model: Any = models.fresh_flowhn(recipe, tokenizer)
        if recipe.training.compile:
            model.compile()
        return model, None
    if config.model is None:
        model = models.fresh_model(recipe.model, tokenizer, recipe.training.seed)
    else:
        model, _ = models.load_model(config.model, dtype=torch.float32)
    models.check_length(model, recipe.data.length)
    if config.method != "baseline":
        model = models.make_sharing(model, recipe.epas.mode if config.method == "epas" else "kv")
    if recipe.training.compile:
        model.compile_pieces() if hasattr(model, "compile_pieces") else model.compile()
    return model, make_schedule(config.method, recipe, model.config.num_hidden_layers)


def _datasets(corpus: Corpus, recipe: Recipe, processes: int, tokenizer: Any) -> tuple[PackedTokens, Subset]:
    data, settings = recipe.data, recipe.training
    end = tokenizer.eos_token_id if data.separate_documents else None
    if data.separate_documents and end is None:
        raise InputError("data.separate_documents needs a tokenizer with an end-of-text token")
    samples = settings.steps * settings.batch_size * settings.accumulation * processes
    training = PackedTokens(corpus.train, data.length, samples=samples, seed=settings.seed, end_of_document=end)
    validation = PackedTokens(corpus.validation, data.length, end_of_document=end)
    return training, Subset(validation, spread(validation.windows, data.validation_windows).tolist())


def _batch(dataset: PackedTokens, size: int) -> dict[str, torch.Tensor]:
    samples = [dataset[i] for i in range(min(size, len(dataset)))]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def _summary(config: RunConfig, folder: RunFolder, corpus: Corpus, model: Any, described: Row) -> Summary:
    rows = folder.metrics()
    trained = [row for row in rows if row["kind"] == "train"]
    validated = [row for row in rows if row["kind"] == "validation"]
    summary: Summary = {
        "method": config.method,
        **described,
        "steps": trained[-1]["step"],
        "tokens": trained[-1]["tokens"],
        "seconds": trained[-1]["seconds"],
        "tokens_per_second": trained[-1]["tokens"] / max(trained[-1]["seconds"], 1e-9),
        "training_loss": trained[-1]["loss"],
        "validation_loss": validated[-1]["loss"],
        "bits_per_byte": validated[-1]["loss"] / 0.6931471805599453 / corpus.bytes_per_token,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "corpus": corpus.name,
        "model": str(folder.model),
        "version": effcore.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    }
    return {"title": title(summary), **summary}


def resumed(folder: RunFolder, method: str) -> tuple[RunConfig, Path]:
    """How a run was started, and its last checkpoint.

    Raises:
        InputError: no such run, or no checkpoint of it that can be read.
    """
    config = folder.config()
    if config.method != method:
        raise InputError(f"--resume {folder.path}: the run's method is {config.method}, not {method}")
    found = checkpoints(folder.path)
    if not found:
        raise InputError(f"--resume {folder.path}: the run has no checkpoint yet; start it again with --overwrite")
    try:
        TrainerState.load_from_json(str(found[-1] / COMPLETE))
    except (ValueError, TypeError) as error:
        raise InputError(f"{found[-1] / COMPLETE}: damaged ({error})") from error
    return config, found[-1]


def finished_run(path: Path, number: str = "tokens_per_second") -> RunFolder:
    """The folder of a finished run that has this number, for ``--against``."""
    folder = RunFolder(path)
    if folder.summary(number) is None:
        raise InputError(f"--against {path}: no finished run here (no summary.json)")
    return folder


def step_of(checkpoint: Path | None) -> int:
    """The step after which a checkpoint was written; 0 for none."""
    return 0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])


@contextmanager
def explained(folder: RunFolder) -> Iterator[None]:
    """Turns a full disk, which comes as any of several exceptions, and a full GPU into one sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            "out of GPU memory: lower training.batch_size or data.length, or --set gradient_checkpointing=true"
        ) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        if not disk_is_full(error):
            raise
        found = checkpoints(folder.path)
        kept = (
            f"the last good checkpoint is {found[-1]}; free space and continue with --resume"
            if found
            else "nothing was saved"
        )
        raise RunError(f"the disk is full ({folder.path}): {kept}") from error
