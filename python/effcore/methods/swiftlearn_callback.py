"""SwiftLearn's recording inside the Hugging Face Trainer. Apart from the method, because importing transformers takes
seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from effcore.methods._surroundings import evaluating

if TYPE_CHECKING:
    from effcore.methods.swiftlearn import Scores, SwiftLearnSampler


_LISTENER = "_effcore_swiftlearn"  # who listens to a model


class SwiftLearnCallback(TrainerCallback):
    """Records what the model answers in training, and measures by forward passes where the sampler asks for it.

    Hooks on the model take ``sample_id`` out of its inputs, so any ``forward`` and any ``compute_loss`` will do. The loader
    must give ``sample_id`` (:meth:`SwiftLearnSampler.indexed`) in the sampler's order;
    :class:`effcore.training.swiftlearn.SwiftLearnTrainer` sees to both.

    Args:
        language: the model is a causal language model: token log-probabilities are recorded instead of logits.
    """

    def __init__(self, sampler: SwiftLearnSampler, *, language: bool = False):
        self.sampler, self.language = sampler, language
        self._handles: list[RemovableHandle] = []
        self._ids: Tensor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.num_train_epochs != 1 or args.max_steps > 0:
            raise ValueError(
                f"effcore.SwiftLearnCallback: the sampler spans the whole run of {self.sampler.epochs} epochs: set "
                f"num_train_epochs=1 and no max_steps, got {args.num_train_epochs:g} and {args.max_steps}"
            )
        loader, model = kwargs["train_dataloader"], kwargs["model"]
        if len(loader.dataset) != self.sampler.samples:
            raise ValueError(
                f"effcore.SwiftLearnCallback: the sampler is for {self.sampler.samples} samples, the Trainer's dataset "
                f"has {len(loader.dataset)}"
            )
        if (
            before := model.__dict__.get(_LISTENER)
        ) is not None:  # of a training that raised: it would take our numbers
            before.forget()
        model.__dict__[_LISTENER] = self
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        if self.sampler.needs_scoring:
            self.sampler.score_with(self._scorer(model, loader), batch_size=args.per_device_eval_batch_size)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.forget()
        kwargs["model"].__dict__.pop(_LISTENER, None)

    def forget(self) -> None:
        """No longer listens to a model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._ids = kwargs.pop("sample_id", None)
        return args, kwargs

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids, self._ids = self._ids, None
        if ids is None or not module.training:
            return
        if self.language:
            self.sampler.record_language(ids, output.logits, kwargs["labels"])
        else:
            self.sampler.record(ids, output.logits)
        if self.sampler.max_weight is not None:
            if self.language:
                raise ValueError(
                    "effcore.SwiftLearnCallback: max_weight is for classifiers; language models have no weights"
                )
            losses = F.cross_entropy(output.logits.float(), kwargs["labels"], reduction="none")
            output.loss = (losses * self.sampler.weights(ids)).mean()

    def _scorer(self, model: nn.Module, loader: Any) -> Callable[[Tensor], Scores]:
        from effcore.methods.importance import token_log_probs

        device = next(model.parameters()).device

        def score(ids: Tensor) -> Scores:
            batch = loader.collate_fn([loader.dataset[i] for i in ids.tolist()])
            batch = {name: value.to(device) for name, value in batch.items()}
            with evaluating(model):
                logits = model(**batch).logits
                return token_log_probs(logits, batch["labels"]) if self.language else logits

        return score
