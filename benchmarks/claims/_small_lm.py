"""A small byte-level LLaMA that learns a task from scratch, a CUDA graph a step, on problems drawn on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.claims._step import TrainStep, linear_decay
from effcore.data.byte_tokenizer import END_OF_DOCUMENT, PAD, VOCAB_SIZE

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""(count, generator) -> fresh problems with their answers on the generator's device: token ids and labels, int64
[count, width]; labels are −100 on the prompt and on padding."""


def numbers_of(mix: Mapping[int, float], count: int, generator: torch.Generator) -> Tensor:
    """How many items each problem has, int64 [count, 1], each number as often as ``mix`` says."""
    shares = torch.tensor(list(mix.values()), device=generator.device)
    numbers = torch.tensor(list(mix), device=generator.device)
    return numbers[torch.multinomial(shares, count, replacement=True, generator=generator)][:, None]


def laid_out(prompt: Tensor, response: Tensor, n: Tensor, per_item: int) -> tuple[Tensor, Tensor]:
    """Rows "prompt=response", the end and padding.

    Args:
        prompt: int64 [count, most], of which the first ``n`` count.
        response: int64 [count, per_item·most], of which the first per_item·n count.
        n: int64 [count, 1].

    Returns:
        ids and labels, int64 [count, (1 + per_item)·most + 2].
    """
    most = prompt.shape[1]
    at = torch.arange((1 + per_item) * most + 2, device=prompt.device).expand(len(prompt), -1)
    end = (1 + per_item) * n + 1
    question = prompt.gather(1, at.clamp(max=most - 1))
    answer = response.gather(1, (at - n - 1).clamp(0, per_item * most - 1))
    ids = torch.where(at < n, question, torch.where(at == n, ord("="), answer))
    ids = torch.where(at < end, ids, torch.where(at == end, END_OF_DOCUMENT, PAD))
    return ids, ids.masked_fill((at <= n) | (at > end), -100)


def causal_mask(width: int, device: torch.device) -> Tensor:
    """[1, 1, width, width], true where to look. Rows are padded on the right, so it needs no more; and a model that is given it
    looks into no tensor to make its own, so the step can be a CUDA graph."""
    return torch.ones(1, 1, width, width, dtype=torch.bool, device=device).tril()


def fresh(seed: int, *, layers: int = 4, width: int = 128) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=END_OF_DOCUMENT,
            eos_token_id=END_OF_DOCUMENT,
            pad_token_id=PAD,
        )
    )


def train(
    model: LlamaForCausalLM,
    draw: Draw,
    *,
    steps: int,
    batch: int,
    peak: float,
    seed: int,
    first: int = 0,
    moments: Sequence[Tensor] | None = None,
    each: Callable[[int, TrainStep], bool] = lambda step, trainer: False,
    schedule: Callable[[int], float] | None = None,
    compiled: bool = False,
) -> None:
    """The steps ``first`` to the last of a run of ``steps``; ``each(step, trainer)`` after each one ends it where it is true.
    ``moments`` are those of the run that it goes on from. Not in bfloat16: a model of this width would spend more on casting
    than it saves."""
    torch.set_float32_matmul_precision("high")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + first)
    called = torch.compile(model, dynamic=False) if compiled else model
    mask: Tensor | None = None
    trainer: TrainStep | None = None

    def forward(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = called(inputs["ids"], attention_mask=mask, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100)
        return loss, loss

    drawn = 64  # steps whose problems are drawn at once
    model.train()
    for step in range(first, steps):
        at = (step - first) % drawn
        if at == 0:
            ids, labels = draw(batch * min(drawn, steps - step), generator)
        rows = slice(at * batch, (at + 1) * batch)
        inputs = {"ids": ids[rows], "labels": labels[rows]}
        if trainer is None:
            mask = causal_mask(ids.shape[1], device)
            trainer = TrainStep(model, forward, inputs, weight_decay=0.01)
            if moments is not None:
                trainer.set_moments(moments)
        trainer(inputs, linear_decay(step, steps, peak=peak) if schedule is None else schedule(step))
        if each(step, trainer):
            break
