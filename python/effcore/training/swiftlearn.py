"""SwiftLearn with the Hugging Face Trainer.

trainer = SwiftLearnTrainer(model, args, sampler=SwiftLearnSampler(data, keep=0.1, epochs=10), train_dataset=data)
trainer.train(resume_from_checkpoint=...)

``args.num_train_epochs`` is 1: the sampler's iterator is the whole run. The state of the sampler lies beside the optimizer's in
each checkpoint, so a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from effcore.errors import InputError, input_error
from effcore.methods.swiftlearn import SwiftLearnSampler
from effcore.methods.swiftlearn_callback import SwiftLearnCallback
from effcore.training import checkpoint

SAMPLER_FILE = "swiftlearn.safetensors"


class SwiftLearnMixin(Trainer):
    """What SwiftLearn adds to a Trainer: ``class Mine(SwiftLearnMixin, MyTrainer)``.

    Args:
        sampler: of ``train_dataset``.
        language: see :class:`SwiftLearnCallback`.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        sampler: SwiftLearnSampler,
        train_dataset: Dataset,
        language: bool = False,
        **kwargs: Any,
    ):
        self.sampler = sampler
        super().__init__(model, args, train_dataset=sampler.indexed(train_dataset), **kwargs)
        self.add_callback(SwiftLearnCallback(sampler, language=language))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SwiftLearnSampler:
        return self.sampler

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[assignment]
        if "sample_id" not in columns:
            columns.append("sample_id")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self.sampler.state_dict()  # all processes
        if self.args.should_save:
            checkpoint.save_tree(Path(output_dir, SAMPLER_FILE), state)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint_folder)
        if checkpoint_folder is None:
            return
        path = Path(checkpoint_folder, SAMPLER_FILE)
        if not path.is_file():
            raise InputError(f"{checkpoint_folder}: not a checkpoint of a SwiftLearn run (no {SAMPLER_FILE})")
        try:
            self.sampler.load_state_dict(checkpoint.load_tree(path))
        except ValueError as error:
            raise input_error(error, str(path)) from error


class SwiftLearnTrainer(SwiftLearnMixin, Trainer):
    """The Hugging Face Trainer on a :class:`SwiftLearnSampler`; ``num_train_epochs`` must be 1."""
