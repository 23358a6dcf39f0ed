"""Letters to put in order, checked exactly: "qbxb=" is answered "bbqx". A byte-level LLaMA learns it from scratch, step by
step."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.claims._step import TrainStep, linear_decay
from effcore.data.byte_tokenizer import END_OF_DOCUMENT, PAD, VOCAB_SIZE, byte_tokenizer
from effcore.methods.verifiers import ClassifierVerifier, train_verifier

LENGTH = 32  # tokens of a problem with its answer, at most


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


def corrupted(rng: random.Random, answer: str) -> str:
    """A wrong answer of a kind that a model gives: a letter too many, too few, another one in order, or two swapped."""
    at, letters = rng.randrange(len(answer)), list(answer)
    kind = rng.randrange(4)
    if kind == 0:
        letters.insert(at, letters[at])
    elif kind == 1:
        del letters[at]
    elif kind == 2:
        letters[at] = chr(ord("a") + (ord(letters[at]) - ord("a") + rng.choice((-2, -1, 1, 2))) % 26)
        letters.sort()
    else:
        other = rng.randrange(len(answer))
        letters[at], letters[other] = letters[other], letters[at]
    return "".join(letters)


def verifier(letters: Sequence[int], base: LlamaForCausalLM, *, steps: int, batch: int) -> ClassifierVerifier:
    """A learned verifier: a classifier that begins as ``base``, trained on right answers and on corrupted ones."""
    rng = random.Random(77)
    prompts, responses, correct = [], [], []
    for prompt, answer in problems(3 * 10**6, min(steps * batch // 2, 60_000), letters):
        for response in (answer, corrupted(rng, answer)):
            prompts.append(prompt)
            responses.append(response)
            correct.append(is_right(prompt, response))
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(base.config)
    model.model.load_state_dict(base.model.state_dict())
    model.to(base.device)
    tokenizer = byte_tokenizer()
    return train_verifier(
        model, tokenizer, prompts, responses, correct, steps=steps, batch_size=batch, learning_rate=1e-3
    )


def encode(rows: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, int64 [rows, LENGTH]; labels are −100 on the prompt and on padding."""
    ids = torch.full((len(rows), LENGTH), PAD)
    labels = torch.full((len(rows), LENGTH), -100)
    for row, (prompt, answer) in enumerate(rows):
        tokens = torch.tensor([*prompt.encode(), *answer.encode(), END_OF_DOCUMENT])
        ids[row, : len(tokens)] = tokens
        labels[row, len(prompt) : len(tokens)] = tokens[len(prompt) :]
    return ids, labels


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
    draw: Callable[[random.Random], tuple[str, str]],
    *,
    steps: int,
    batch: int,
    peak: float,
    seed: int,
    first: int = 0,
    last: int | None = None,
    each: Callable[[int], bool] = lambda step: False,
    schedule: Callable[[int], float] | None = None,
    trainer: TrainStep | None = None,
) -> TrainStep:
    """Steps ``first`` to ``last`` of a run of ``steps``; ``each(step)`` after each one ends it where it is true."""
    device = next(model.parameters()).device
    rng = random.Random(seed * 1_000_003 + first)

    def forward(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(inputs["ids"], use_cache=False).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), inputs["labels"][:, 1:].flatten(), ignore_index=-100
        )
        return loss, loss

    def batches(count: int) -> dict[str, Tensor]:
        ids, labels = encode([draw(rng) for _ in range(count)])
        return {"ids": ids.to(device, non_blocking=True), "labels": labels.to(device, non_blocking=True)}

    model.train()
    trainer = trainer or TrainStep(model, forward, batches(batch), weight_decay=0.01)
    for step in range(first, steps if last is None else last):
        rate = linear_decay(step, steps, peak=peak) if schedule is None else schedule(step)
        trainer(batches(batch), rate)
        if each(step):
            break
    return trainer
