"""Multiple-choice questions: from a ``.jsonl`` file of one's own, or made of real text.

A line of the file is ``{"question": "...", "choices": ["...", ...], "answer": 0}``, with as many choices in each line. Made
of text, a question shows some lines of a source file and asks which of four lines comes next; the other three are of the same
file.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effcore.data.json_lines import json_lines
from effcore.data.sources import SourceFile
from effcore.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """A text, the choices that it asks between, and the number of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int

    def prompt(self) -> str:
        """The text, a line a choice with its letter, and "Answer:", behind which a letter is expected."""
        options = "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        return f"{self.text}\n{options}\nAnswer:"


def read_questions(path: Path) -> list[Question]:
    """The questions of a file.

    Raises:
        InputError: naming the line, what was expected and what came.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    questions: list[Question] = []
    for number, row in json_lines(path):
        place = f"{path}, line {number}"
        try:
            text, choices, answer = row["question"], tuple(row["choices"]), row["answer"]
        except (KeyError, TypeError) as error:
            raise InputError(
                f'{place}: expected {{"question": ..., "choices": [...], "answer": n}} ({error!r})'
            ) from None
        if not isinstance(text, str) or not all(isinstance(c, str) for c in choices):
            raise InputError(f"{place}: question and choices must be strings")
        if not 2 <= len(choices) <= len(LETTERS):
            raise InputError(f"{place}: expected 2 to {len(LETTERS)} choices, got {len(choices)}")
        if questions and len(choices) != len(questions[0].choices):
            raise InputError(f"{place}: {len(choices)} choices, but the first question has {len(questions[0].choices)}")
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise InputError(f"{place}: answer must be from 0 to {len(choices) - 1}, got {answer!r}")
        questions.append(Question(text, choices, answer))
    if not questions:
        raise InputError(f"{path}: holds no questions")
    return questions


def next_line_questions(files: Sequence[SourceFile], count: int, *, seed: int = 0, shown: int = 3) -> list[Question]:
    """Which of four lines comes next: the same questions for the same files and seed."""
    rng = random.Random(seed)
    files = list(files)
    lines_of: dict[SourceFile, list[str]] = {}
    questions: list[Question] = []
    for _ in range(20 * count):
        if len(questions) == count:
            break
        file = rng.choice(files)
        if file not in lines_of:
            text = file.path.read_text(encoding="utf-8", errors="ignore")
            lines_of[file] = [line.rstrip() for line in text.splitlines() if 12 <= len(line.strip()) <= 80]
        lines = lines_of[file]
        if len(lines) < 12:
            continue
        at = rng.randrange(shown, len(lines))
        others = {line.strip() for line in lines} - {lines[at].strip()}
        choices = [lines[at].strip(), *rng.sample(sorted(others), min(3, len(others)))]
        if len(choices) < 4:
            continue
        order = rng.sample(range(4), 4)
        shuffled = tuple(choices[i] for i in order)
        questions.append(Question("\n".join(lines[at - shown : at]), shuffled, order.index(0)))
    if len(questions) < count:
        raise InputError(f"the files give {len(questions)} questions, {count} were asked for")
    return questions


def answer_tokens(tokenizer: PreTrainedTokenizerBase, choices: int) -> list[int]:
    """The token with which each letter begins, after "Answer:"."""
    before = tokenizer("Answer:", add_special_tokens=False)["input_ids"]
    ids = []
    for letter in LETTERS[:choices]:
        both = tokenizer(f"Answer: {letter}", add_special_tokens=False)["input_ids"]
        ids.append(both[len(before)] if both[: len(before)] == before else both[-1])
    if len(set(ids)) != len(ids):  # a token of its own for the space: the letters are what tells them apart
        ids = [tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in LETTERS[:choices]]
    return ids


def batches(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, *, size: int, max_length: int
) -> Iterator[dict[str, Tensor]]:
    """``input_ids``, ``attention_mask`` (padded on the right) and ``labels`` [B]. Long questions lose their beginning."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    for begin in range(0, len(questions), size):
        some = questions[begin : begin + size]
        rows = [tokenizer(q.prompt())["input_ids"][-max_length:] for q in some]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), int(pad))  # type: ignore[arg-type]
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        yield {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([q.answer for q in some])}
