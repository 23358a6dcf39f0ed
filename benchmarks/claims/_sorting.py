"""Letters to put in order, checked exactly: "qbxb=" is answered "bbqx". A byte-level LLaMA learns it from scratch, step by
step."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.claims._step import TrainStep, linear_decay
from effcore.data.byte_tokenizer import END_OF_DOCUMENT, PAD, VOCAB_SIZE

Mix = Mapping[int, float]  # how often each number of letters is drawn
_ASKED = ord("=")


def length(most: int) -> int:
    """Tokens of a problem with its answer: both, "=" and the end."""
    return 2 * most + 2


def problem(rng: random.Random, letters: int) -> tuple[str, str]:
    """Prompt and answer."""
    drawn = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(letters))
    return drawn + "=", "".join(sorted(drawn))


def problems(seed: int, count: int, letters: Sequence[int]) -> list[tuple[str, str]]:
    """Different problems for different seeds, as good as surely."""
    rng = random.Random(seed)
    return [problem(rng, rng.choice(letters)) for _ in range(count)]


def is_right(prompt: str, response: str) -> bool:
    """Exact checking."""
    return response == "".join(sorted(prompt[:-1]))


def encoded(count: int, mix: Mix, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Fresh problems with their answers on the generator's device: token ids and labels, int64 [count, length]; labels are
    −100 on the prompt and on padding."""
    device, most = generator.device, max(mix)
    shares = torch.tensor(list(mix.values()), device=device)
    numbers = torch.tensor(list(mix), device=device)
    n = numbers[torch.multinomial(shares, count, replacement=True, generator=generator)][:, None]
    letters = torch.randint(ord("a"), ord("z") + 1, (count, most), device=device, generator=generator)
    ordered = letters.masked_fill(torch.arange(most, device=device) >= n, 1000).sort(1).values
    at = torch.arange(length(most), device=device).expand(count, -1)
    question = letters.gather(1, at.clamp(max=most - 1))
    answer = ordered.gather(1, (at - n - 1).clamp(0, most - 1))
    ids = torch.where(at < n, question, torch.where(at == n, _ASKED, answer))
    ids = torch.where(at <= 2 * n, ids, torch.where(at == 2 * n + 1, END_OF_DOCUMENT, PAD))
    return ids, ids.masked_fill((at <= n) | (at > 2 * n + 1), -100)


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
    mix: Mix,
    *,
    steps: int,
    batch: int,
    peak: float,
    seed: int,
    first: int = 0,
    each: Callable[[int], bool] = lambda step: False,
    schedule: Callable[[int], float] | None = None,
    trainer: TrainStep | None = None,
) -> TrainStep:
    """Steps ``first`` to the last of a run of ``steps``; ``each(step)`` after each one ends it where it is true."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + first)
    mask = causal_mask(length(max(mix)), device)

    def forward(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(inputs["ids"], attention_mask=mask, use_cache=False).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), inputs["labels"][:, 1:].flatten(), ignore_index=-100
        )
        return loss, loss

    drawn = 64  # steps whose problems are drawn at once
    model.train()
    for step in range(first, steps):
        at = (step - first) % drawn
        if at == 0:
            ids, labels = encoded(batch * min(drawn, steps - step), mix, generator)
        rows = slice(at * batch, (at + 1) * batch)
        inputs = {"ids": ids[rows], "labels": labels[rows]}
        trainer = trainer or TrainStep(model, forward, inputs, weight_decay=0.01)
        trainer(inputs, linear_decay(step, steps, peak=peak) if schedule is None else schedule(step))
        if each(step):
            break
    assert trainer is not None
    return trainer
