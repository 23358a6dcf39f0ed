"""Letters to put in order, checked exactly: "qbxb=" is answered "bbqx"."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.claims._small_lm import Draw, laid_out, numbers_of

PER_ITEM = 1  # tokens of an answer for each of the prompt


def problem(rng: random.Random, letters: int) -> tuple[str, str]:
    """Prompt and answer."""
    drawn = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(letters))
    return drawn + "=", "".join(sorted(drawn))


def problems(seed: int, count: int, letters: Sequence[int]) -> list[tuple[str, str]]:
    """Different problems for different seeds, as good as surely."""
    rng = random.Random(seed)
    return [problem(rng, rng.choice(letters)) for _ in range(count)]


def prompts(seed: int, count: int, letters: Sequence[int]) -> list[str]:
    """Those of :func:`problems`."""
    return [prompt for prompt, _ in problems(seed, count, letters)]


def result(response: str) -> str:
    """What a response comes to: all of it."""
    return response


def is_right(prompt: str, response: str) -> bool:
    """Exact checking."""
    return response == "".join(sorted(prompt[:-1]))


def draws(mix: Mapping[int, float]) -> Draw:
    """Problems with so many letters, each number as often as ``mix`` says."""
    most = max(mix)

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        device = generator.device
        n = numbers_of(mix, count, generator)
        letters = torch.randint(ord("a"), ord("z") + 1, (count, most), device=device, generator=generator)
        ordered = letters.masked_fill(torch.arange(most, device=device) >= n, 1000).sort(1).values
        return laid_out(letters, ordered, n, PER_ITEM)

    return draw
