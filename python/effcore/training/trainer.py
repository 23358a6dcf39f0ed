"""The Hugging Face Trainer with three changes: checkpoints without pickle that appear whole or not at all, no state but what a
checkpoint holds, so that a resumed run repeats the uninterrupted one bit by bit, and (:class:`SharingTrainer`) samples in the
order of their numbers.

Everything else (torchrun, DDP, FSDP2, mixed precision, accumulation, clipping) is the Trainer's and Accelerate's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments

from effcore.errors import InputError
from effcore.files import staged
from effcore.training import checkpoint
from effcore.training.recipe import TrainingSettings

OPTIMIZER_FILE = "optimizer.safetensors"
SCHEDULER_FILE = "scheduler.safetensors"


class CheckpointTrainer(Trainer):
    """A Trainer whose checkpoints are :mod:`effcore.training.checkpoint`'s."""

    _staging: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run = Path(str(self.args.output_dir))
        barrier = self.accelerator.wait_for_everyone
        with staged(run, is_main=self.args.should_save, barrier=barrier) as self._staging:
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
        if self.args.should_save and self.args.save_total_limit:
            checkpoint.keep_latest(run, self.args.save_total_limit)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The model and its tokenizer; unlike the base class no pickled ``training_args.bin`` (config.yaml says it all)."""
        folder = str(output_dir or self.args.output_dir)
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            model.save_pretrained(folder, state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.model is not None and self.optimizer is not None and self.lr_scheduler is not None
        # A sharded state is gathered by all processes.
        state = (
            checkpoint.gathered_optimizer(self.model, self.optimizer)
            if self.is_fsdp_enabled
            else self.optimizer.state_dict()
        )
        if self.args.should_save:
            checkpoint.save_tree(Path(output_dir, OPTIMIZER_FILE), state)
            checkpoint.save_tree(Path(output_dir, SCHEDULER_FILE), self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None:
            return
        assert self.model is not None and self.optimizer is not None and self.lr_scheduler is not None
        state = checkpoint.load_tree(Path(checkpoint_folder, OPTIMIZER_FILE))
        if self.is_fsdp_enabled:
            checkpoint.scatter_optimizer(self.model, self.optimizer, state)
        else:
            self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(checkpoint.load_tree(Path(checkpoint_folder, SCHEDULER_FILE)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        model = self.model if model is None else model
        assert model is not None
        try:
            if self.is_fsdp_enabled:
                checkpoint.scatter_model(model, Path(resume_from_checkpoint))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        except SafetensorError as error:
            raise InputError(f"{resume_from_checkpoint}: the model's file is damaged ({error})") from error

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        checkpoint.save_tree(self._random_file(output_dir), checkpoint.random_state())

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None and self._random_file(checkpoint_folder).is_file():
            checkpoint.set_random_state(checkpoint.load_tree(self._random_file(checkpoint_folder)))

    def _random_file(self, folder: str) -> Path:
        return Path(folder, f"random_{self.args.process_index}.safetensors")


class SharingTrainer(CheckpointTrainer):
    """A Trainer for :class:`effcore.data.PackedTokens`, whose order is its own: it is read from front to back."""

    def __init__(self, *args: Any, extra_loss: Callable[[], torch.Tensor | None] | None = None, **kwargs: Any):
        """``extra_loss`` gives a term that is added to the loss of the forward before it (ECHO's distillation)."""
        super().__init__(*args, **kwargs)
        self._extra_loss = extra_loss
        self._extra_sum = torch.zeros((), device=self.args.device)
        self._extra_logged = 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        # A cache is of no use here, costs memory, and makes transformers' own classes attend across packed documents.
        inputs = {**inputs, "use_cache": False}
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        extra = self._extra_loss() if self._extra_loss is not None and model.training else None
        if extra is None:
            return result
        extra = extra / self.args.gradient_accumulation_steps
        self._extra_sum = self._extra_sum + extra.detach()
        return (result[0] + extra, result[1]) if return_outputs else result + extra

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Reports the extra term as ``distillation``, apart from ``loss``, which stays comparable between methods."""
        if "loss" in logs and self._extra_loss is not None:
            steps = max(self.state.global_step - max(self._extra_logged, self._initial_global_step), 1)
            distillation = self.accelerator.gather(self._extra_sum).mean().item() / steps
            logs = {**logs, "loss": logs["loss"] - distillation, "distillation": distillation}
            self._extra_sum, self._extra_logged = torch.zeros_like(self._extra_sum), self.state.global_step
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # type: ignore[arg-type]


class OneDeviceArguments(TrainingArguments):
    """Arguments of a process that works on one device; more of them are torchrun's affair.

    The Trainer would wrap the model in ``nn.DataParallel`` where it sees several GPUs. That copies the model at every step, and
    a step's activations and losses, which layers and schedules hand to each other, end on different devices.
    """

    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)


def training_arguments(settings: TrainingSettings, output: Path, *, shares: bool) -> TrainingArguments:
    """The Trainer's arguments for a recipe's ``training`` section; ``shares`` says that layers (will) share activations.

    Raises:
        InputError: ``sharded`` where Accelerate would silently replicate instead.
    """
    if settings.sharded and not (torch.cuda.is_available() and "LOCAL_RANK" in os.environ):
        raise InputError("training.sharded: Accelerate shards on GPUs, in processes that torchrun started")
    return OneDeviceArguments(
        output_dir=str(output),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        warmup_steps=settings.warmup_ratio,  # below 1: a share of the steps
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.clip_norm,
        bf16=settings.precision == "bfloat16",
        seed=settings.seed,
        logging_strategy="steps",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=settings.validate_every,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        save_total_limit=settings.keep_checkpoints,
        # The projections of a layer that shares get no gradient: DDP must not wait for it.
        ddp_find_unused_parameters=shares,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        fsdp=settings.sharded or None,  # type: ignore[arg-type]  # annotated for a deprecated string form
        fsdp_config={"version": 2, "state_dict_type": "FULL_STATE_DICT"} if settings.sharded else None,
        log_level="error",
    )
