"""The text of Bayesian-MoE's claim, and its questions: which of four lines of a source file comes next.

The text is what every machine with torch has: the Python sources of the standard library and of the installed packages, 100 to
200 MB. Files that are copies of each other count once. A hash of the name decides what a file is for: nine in ten to pretrain
on, the others for questions, in three parts that share no file. Text of another kind is the C++ headers that come with torch:
no model here was trained on any.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from effcore.data.questions import Question, next_line_questions
from effcore.data.sources import SourceFile, list_files, standard_library

VOCABULARY = 8192
END, PAD = 0, 1  # of a document; behind the last token of a row
SHOWN = 6  # lines before the four
LENGTH = 160  # tokens of a row at most; longer ones lose their beginning
SAMPLE_BYTES = 24 << 20  # of text, to learn the tokens from

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Sources:
    """Files by what they are for."""

    pretraining: list[SourceFile]
    parts: dict[str, list[SourceFile]]  # "train", "held", "test", "other"


def find_sources(most_bytes: int) -> Sources:
    packages = Path(torch.__file__).parent.parent
    python = [*standard_library(), *(f for f in list_files(packages) if f.path.suffix == ".py")]
    headers = [f for f in list_files(packages / "torch" / "include") if f.path.suffix in (".h", ".hpp", ".cuh")]
    headers = [f for f in headers if "/ops/" not in f.name]  # generated, thousands of one kind
    random.Random(0).shuffle(python)
    unique = {hashlib.sha256(f.path.read_bytes()).digest(): f for f in reversed(python) if 500 <= f.size <= 400_000}
    sources = Sources([], {"train": [], "held": [], "test": [], "other": headers})
    total = 0
    for file in unique.values():
        place = _share(file.name)
        if place >= 0.1:
            if total < most_bytes:
                sources.pretraining.append(file)
                total += file.size
        else:
            sources.parts["train" if place < 0.05 else "held" if place < 0.07 else "test"].append(file)
    return sources


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


def make_questions(sources: Sources, counts: dict[str, int]) -> dict[str, list[Question]]:
    return {
        part: next_line_questions(sources.parts[part], count, seed=seed, shown=SHOWN)
        for seed, (part, count) in enumerate(counts.items())
    }


def batches(tokenizer: Tokenizer, questions: Sequence[Question], size: int) -> list[Batch]:
    """``input_ids`` [B, 4, L]: the lines and one of the four behind them; ``last`` [B, 4], where its last token stands; ``labels``."""
    texts = [f"{q.text}\n{choice}\n" for q in questions for choice in q.choices]
    rows = [row.ids[-LENGTH:] for row in tokenizer.encode_batch_fast(texts)]
    result = []
    for begin in range(0, len(questions), size):
        some = questions[begin : begin + size]
        of_them = rows[4 * begin : 4 * (begin + len(some))]
        width = -(-max(map(len, of_them)) // 16) * 16
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in of_them])
        last = torch.tensor([len(row) - 1 for row in of_them])
        labels = torch.tensor([q.answer for q in some])
        result.append({"input_ids": ids.view(-1, 4, width), "last": last.view(-1, 4), "labels": labels})
    return result


def all_labels(data: list[Batch]) -> Tensor:
    return torch.cat([batch["labels"] for batch in data])
