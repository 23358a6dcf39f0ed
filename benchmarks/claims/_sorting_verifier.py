"""A learned judge of letters put in order: a token classifier that says at each letter whether the answer is right so far.

It begins as a given model with two layers on top: what the model expects next is known in its last layer, and comparing it with
what comes, and remembering, take one each. It reads corrupted answers and, where told to, that model's own, all labelled by
exact checking. Its problems are its own: none of them is a query.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForTokenClassification

from benchmarks.claims._small_lm import causal_mask
from benchmarks.claims._sorting import problems
from benchmarks.claims._step import TrainStep, linear_decay
from effcore.data.byte_tokenizer import PAD, byte_tokenizer
from effcore.methods.sampling import sample_texts
from effcore.methods.verifiers import ProcessRewardVerifier

END = "\n"  # behind an answer: here the judgement is of the whole


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


def judged(rows: Sequence[tuple[str, str]], width: int) -> tuple[Tensor, Tensor]:
    """Token ids of prompt + response + END and labels, int64 [rows, width]: 1 where the response is right so far, at END where
    it is the whole answer, 0 where not, −100 elsewhere."""
    ids = np.full((len(rows), width), PAD)
    labels = np.full((len(rows), width), -100)
    for row, (prompt, response) in enumerate(rows):
        text = (prompt + response + END).encode("utf-8", "replace")[:width]
        answer = "".join(sorted(prompt[:-1])) + END
        ids[row, : len(text)] = list(text)
        right = True
        for i, letter in enumerate(text[len(prompt) :]):
            right = right and i < len(answer) and letter == ord(answer[i])
            labels[row, len(prompt) + i] = right
    return torch.from_numpy(ids), torch.from_numpy(labels)


def verifier(
    letters: Sequence[int],
    base: LlamaForCausalLM,
    *,
    steps: int,
    batch: int,
    peak: float = 1e-3,
    count: int = 40_000,
    own: bool = False,
) -> ProcessRewardVerifier:
    """Trained on ``count`` problems: the answers and corrupted ones, and with ``own`` also samples of ``base``."""
    rng = random.Random(77)
    given = problems(3 * 10**6, count, letters)
    rows = [(prompt, response) for prompt, answer in given for response in (answer, corrupted(rng, answer))]
    if own:
        asked = [prompt for prompt, _ in problems(4 * 10**6, count // 4, letters)]
        drawn = sample_texts(
            base,
            byte_tokenizer(),
            asked,
            num_samples=8,
            max_new_tokens=max(letters) + 1,
            batch_size=2000,
            seed=3,
            temperature=1.0,
            top_k=0,
        )
        rows += [(prompt, text) for prompt, texts in zip(asked, drawn, strict=True) for text in texts]
    torch.manual_seed(0)
    config = copy.deepcopy(base.config)
    config.num_hidden_layers, config.num_labels = base.config.num_hidden_layers + 2, 2
    model: Any = LlamaForTokenClassification(config)
    model.model.load_state_dict(base.model.state_dict(), strict=False)
    device = base.device
    model.to(device).train()
    ids, labels = (tensor.to(device) for tensor in judged(rows, 2 * max(letters) + 4))
    generator = torch.Generator(device).manual_seed(0)
    mask = causal_mask(ids.shape[1], device)

    def forward(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = model(inputs["ids"], attention_mask=mask, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), ignore_index=-100)
        return loss, loss

    trainer = None
    for step in range(steps):
        chosen = torch.randint(len(rows), (batch,), device=device, generator=generator)
        inputs = {"ids": ids[chosen], "labels": labels[chosen]}
        trainer = trainer or TrainStep(model, forward, inputs)
        trainer(inputs, linear_decay(step, steps, peak=peak))
    return ProcessRewardVerifier(model, byte_tokenizer(), separator=END, batch_size=4096)
