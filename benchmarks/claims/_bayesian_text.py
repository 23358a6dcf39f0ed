"""The text of Bayesian-MoE's claim, and its questions: which of four lines of a source file comes next.

The text is what every machine with torch has: Python sources of the standard library and of the installed packages, and the C++
headers among these. Files that are copies of each other count once. A hash of the name decides what a file is for: nine in ten
to pretrain on, the others for questions: Python's in three parts that share no file, and headers as text of another kind, which
the language model knows, but which none of the questions that are learnt from is of.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.claims._bayesian_task import Batch
from effcore.data.questions import Question, next_line_questions, read_questions
from effcore.data.sources import SourceFile, list_files, standard_library

VOCABULARY = 8192
END, PAD = 0, 1  # of a document; behind the last token of a row
SHOWN = 5  # lines before the four
LENGTH = 112  # tokens of a row at most; longer ones lose their beginning
POOL = 16  # batches whose questions are sorted by length
HEADERS = (".h", ".hpp", ".cuh")
SAMPLE_BYTES = 24 << 20  # of text, to learn the tokens from


@dataclass(frozen=True)
class Sources:
    """Files by what they are for."""

    pretraining: list[SourceFile]
    parts: dict[str, list[SourceFile]]  # "train", "held", "test", "other"


def find_sources(most_bytes: int, *, development: bool = False) -> Sources:
    """All files, of which at most so many bytes to pretrain on. Some are for development alone: in place of those of "test" and
    "other"."""
    packages = list_files(Path(torch.__file__).parent.parent)
    headers = [
        f for f in packages if f.path.suffix in HEADERS and "/ops/" not in f.name
    ]  # those are generated, by thousands
    files = [*standard_library(), *(f for f in packages if f.path.suffix == ".py"), *headers]
    random.Random(0).shuffle(files)
    unique = {hashlib.sha256(f.path.read_bytes()).digest(): f for f in reversed(files) if 500 <= f.size <= 400_000}
    sources, total = Sources([], {"train": [], "held": [], "test": [], "other": []}), 0
    for file in unique.values():
        place = _share(file.name)
        part = _part(place, file.path.suffix in HEADERS)
        if part == "pretraining":
            if total < most_bytes:
                sources.pretraining.append(file)
                total += file.size
        elif part in ("train", "held") or part.startswith("development ") == development:
            sources.parts[part.removeprefix("development ")].append(file)
    return sources


def _part(place: float, is_header: bool) -> str:
    """Of a file at this place among all, from 0 to 1."""
    if place >= 0.1:
        return "pretraining"
    if is_header:
        return "other" if place < 0.07 else "development other"
    ends = {0.05: "train", 0.07: "held", 0.09: "test", 0.1: "development test"}
    return next(part for end, part in ends.items() if place < end)


def _share(name: str) -> float:
    """A number from 0 to 1 that hangs on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64


def _read(files: Iterable[SourceFile]) -> Iterable[str]:
    return (f.path.read_text(encoding="utf-8", errors="ignore") for f in files)


def learn_tokens(files: Sequence[SourceFile]) -> Tokenizer:
    """Byte-level BPE on a sample of the files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sample, total = [], 0
    for file in random.Random(1).sample(files, len(files)):
        sample.append(file)
        total += file.size
        if total > SAMPLE_BYTES:
            break
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(_read(sample), trainer)
    return tokenizer


def encode_files(tokenizer: Tokenizer, files: Sequence[SourceFile]) -> np.ndarray:
    """uint16 [tokens]: all files, one behind the other, each with END."""
    pieces = []
    for begin in range(0, len(files), 512):
        for row in tokenizer.encode_batch_fast(list(_read(files[begin : begin + 512]))):
            pieces.append(np.array([*row.ids, END], np.uint16))
    return np.concatenate(pieces)


def make_questions(files: dict[str, Path], sources: Sources, counts: dict[str, int]) -> dict[str, list[Question]]:
    """Questions of each part, as they stand in its file, where they are kept."""
    questions = {}
    for seed, (part, count) in enumerate(counts.items()):
        file = files[part]
        if not file.exists():
            made = next_line_questions(sources.parts[part], count, seed=seed, shown=SHOWN)
            rows = [{"question": q.text, "choices": q.choices, "answer": q.answer} for q in made]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        questions[part] = read_questions(file)
        if len(questions[part]) != count:
            sys.exit(f"{file} holds {len(questions[part])} questions, not {count}: remove it, or give another --out")
    return questions


def batches(tokenizer: Tokenizer, questions: Sequence[Question], size: int) -> list[Batch]:
    """``input_ids`` [B, 4, L]: the lines and one of the four behind them; ``last`` [B, 4], where its last token stands; and
    ``labels``. Questions of like length stand together, in an order that hangs on the questions alone."""
    texts = [f"{q.text}\n{choice}\n" for q in questions for choice in q.choices]
    rows = [row.ids[-LENGTH:] for row in tokenizer.encode_batch_fast(texts)]
    fours = [(rows[4 * i : 4 * i + 4], q.answer) for i, q in enumerate(questions)]
    result = []
    for begin in range(0, len(fours), POOL * size):
        pool = sorted(fours[begin : begin + POOL * size], key=lambda four: max(map(len, four[0])))
        result += [_batch(pool[i : i + size]) for i in range(0, len(pool), size)]
    return result


def _batch(fours: Sequence[tuple[list[list[int]], int]]) -> Batch:
    width = -(-max(len(row) for four, _ in fours for row in four) // 16) * 16
    ids = torch.tensor([[row + [PAD] * (width - len(row)) for row in four] for four, _ in fours])
    last = torch.tensor([[len(row) - 1 for row in four] for four, _ in fours])
    return {"input_ids": ids, "last": last, "labels": torch.tensor([answer for _, answer in fours])}
