"""SwiftLearn inside the Hugging Face Trainer, on a classifier and on a language model."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from effcore.errors import InputError
from effcore.methods.swiftlearn import SwiftLearnSampler
from effcore.training.swiftlearn import SAMPLER_FILE, SwiftLearnTrainer


class Sentences(torch.utils.data.Dataset):
    """The label says whether token 3 occurs."""

    def __init__(self, count=40, language=False):
        self.ids = torch.randint(4, 20, (count, 6), generator=torch.Generator().manual_seed(0))
        self.labels = torch.arange(count) % 2
        self.ids[self.labels == 1, 2] = 3
        if language:
            self.labels = self.ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i], "unused": torch.tensor(1)}


def classifier():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )


class Watch(TrainerCallback):
    """What the model was trained on, and its weights after each step; stops after ``stop`` steps."""

    def __init__(self, stop=None):
        self.stop, self.rows = stop, []

    def on_step_end(self, args, state, control, **kwargs):
        weight = next(kwargs["model"].parameters())
        self.rows.append((state.global_step, weight.detach().sum().item(), kwargs["optimizer"].param_groups[0]["lr"]))
        if state.global_step == self.stop:
            control.should_save = control.should_training_stop = True


def train(folder, *, stop=None, resume=None, language=False, arguments=None, model=None, listener=None, **options):
    data = Sentences(language=language)
    if model is not None:
        pass
    elif language:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        )
    else:
        model = classifier()
    sampler = SwiftLearnSampler(data, **({"keep": 0.25, "epochs": 5} | options))
    args = TrainingArguments(
        **(
            {
                "output_dir": str(folder),
                "num_train_epochs": 1,
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 16,
                "learning_rate": 1e-2,
                "save_strategy": "no",
                "report_to": [],
                "disable_tqdm": True,
                "use_cpu": True,
                "logging_strategy": "no",
            }
            | (arguments or {})
        )
    )
    watch = Watch(stop)
    trainer = SwiftLearnTrainer(
        model, args, sampler=sampler, train_dataset=data, language=language, callbacks=[listener or watch]
    )
    trainer.train(resume_from_checkpoint=resume)
    return watch.rows, sampler


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"select": "topk"},
        {"refresh_every": 1},
        {"recording": "evaluation"},
        {"max_weight": 2.0},
        {"language": True},
        {"language": True, "refresh_every": 1, "refresh": "visited"},
    ],
    ids=str,
)
def test_interrupted_and_resumed_equals_uninterrupted(options, tmp_path):
    whole, sampler = train(tmp_path / "whole", **options)
    steps = -(-len(sampler) // 4)
    assert [row[0] for row in whole] == list(range(1, steps + 1)) and steps == 28
    assert whole[-2][2] == pytest.approx(1e-2 / steps) and whole[-1][2] == 0  # the schedule ends with the shortened run
    assert (~sampler.state_dict()["change"].isnan()).sum() >= 36  # the loader runs ahead by one batch of 4
    for stop in (13, 20, 21, 25):
        folder = tmp_path / str(stop)
        first, _ = train(folder, stop=stop, **options)
        rest, _ = train(folder, resume=str(folder / f"checkpoint-{stop}"), **options)
        assert first + rest == whole, stop


class Failure(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_a_training_that_raised_does_not_listen_to_the_next(tmp_path):
    model = classifier()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model=model, listener=Failure())
    _, sampler = train(tmp_path, model=model)
    assert (~sampler.state_dict()["change"].isnan()).sum() >= 36
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set num_train_epochs=1 and no max_steps, got 3 and -1"):
        train(tmp_path, arguments={"num_train_epochs": 3})
    with pytest.raises(ValueError, match="got 1 and 5"):
        train(tmp_path, arguments={"max_steps": 5})
    train(tmp_path, stop=9)
    with pytest.raises(InputError, match="the state was made with"):
        train(tmp_path, resume=str(tmp_path / "checkpoint-9"), keep=0.5)
    (tmp_path / "checkpoint-9" / SAMPLER_FILE).unlink()
    with pytest.raises(InputError, match="not a checkpoint of a SwiftLearn run"):
        train(tmp_path, resume=str(tmp_path / "checkpoint-9"))


def test_weights_are_for_classifiers(tmp_path):
    with pytest.raises(ValueError, match="max_weight is for classifiers"):
        train(tmp_path, language=True, max_weight=2.0)
