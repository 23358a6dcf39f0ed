"""Digits to add modulo 10, one after the other in any order: "274=" is answered "774123" (7 makes 7, with 4 it is 1, with 2 it
is 3) or in one of five other orders.

What counts is the last digit. Samples take different ways to it and go wrong at different places, as chains of thought do, so
that a vote among them knows more than one of them, and more than the most likely one."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.claims._small_lm import Draw, laid_out, numbers_of

PER_ITEM = 2  # tokens of an answer for each of the prompt


def prompts(seed: int, count: int, digits: Sequence[int]) -> list[str]:
    """Different ones for different seeds, as good as surely."""
    rng = random.Random(seed)
    return ["".join(rng.choice("0123456789") for _ in range(rng.choice(digits))) + "=" for _ in range(count)]


def result(response: str) -> str | None:
    """What a response comes to: its last digit."""
    return response[-1:] or None


def is_right(prompt: str, response: str) -> bool:
    """Exact checking of the result, however it was come by."""
    return result(response) == str(sum(map(int, prompt[:-1])) % 10)


def draws(mix: Mapping[int, float]) -> Draw:
    """Problems with so many digits, each number as often as ``mix`` says."""
    most, zero = max(mix), ord("0")

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        device = generator.device
        n = numbers_of(mix, count, generator)
        given = torch.randint(10, (count, most), device=device, generator=generator)
        keys = torch.rand(count, most, device=device, generator=generator)
        order = keys.masked_fill(torch.arange(most, device=device) >= n, 2.0).argsort(1)
        taken = given.gather(1, order)
        steps = torch.stack([taken, taken.cumsum(1) % 10], -1).flatten(1)
        return laid_out(zero + given, zero + steps, n, PER_ITEM)

    return draw
