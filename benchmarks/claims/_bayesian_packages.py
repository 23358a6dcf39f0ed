"""A task of Bayesian-MoE's claim: which of PyTorch's packages a piece of source text comes from, a question with 8 answers.

Code without comments and strings is what is trained on; comments and docstrings of the same packages are text of another kind,
whose answers are known too. Files are split before they are cut into pieces.
"""

from __future__ import annotations

import io
import random
import re
import tokenize
import zlib
from pathlib import Path

import torch

from benchmarks.claims._bayesian_task import Batch

PACKAGES = ("_inductor", "distributed", "_dynamo", "fx", "nn", "ao", "utils", "onnx")
WORDS = 4096  # a word is a token: its checksum modulo this
ANSWERS = list(range(WORDS, WORDS + len(PACKAGES)))
PAD, ASK = WORDS + len(PACKAGES), WORDS + len(PACKAGES) + 1
LENGTH = 24  # words of a piece
FILES = 96  # of a package, for all parts together
SHARES = {"train": (0.0, 0.4), "held": (0.4, 0.6), "test": (0.6, 1.0)}  # of a package's files

Piece = tuple[list[int], int]  # tokens, number of the package


def separate(text: str) -> tuple[str, str]:
    """Code without its comments and strings, and the comments and docstrings alone."""
    code, prose = [], []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and len(token.string) > 40):
                prose.append(token.string.strip("#\"' "))
            elif token.type not in (tokenize.STRING, tokenize.ENCODING):
                code.append(token.string if token.type != tokenize.INDENT else " ")
    except (tokenize.TokenError, SyntaxError):
        pass
    return " ".join(code), " ".join(prose)


def _pieces(text: str, label: int) -> list[Piece]:
    words = [zlib.crc32(word.encode()) % WORDS for word in re.findall(r"[A-Za-z]{2,}", text)]
    return [(words[i : i + LENGTH], label) for i in range(0, len(words) - LENGTH + 1, LENGTH)]


def _files(package: str, rng: random.Random) -> list[Path]:
    root = Path(torch.__file__).parent / package
    files = sorted(f for f in root.rglob("*.py") if 2_000 <= f.stat().st_size <= 60_000)
    return rng.sample(files, min(FILES, len(files)))


def make_data(train: int, test: int, batch: int) -> dict[str, list[Batch]]:
    """Batches of "train", "held" (to choose priors and temperatures), "test", and "other" (of the test files); "fit" is "train"
    again.

    Args:
        train, test: at most so many pieces of a part, as many of each package.
        batch: of "train"; the others', where nothing is learnt, are four times as large.
    """
    rng = random.Random(0)
    found: dict[str, list[Piece]] = {"train": [], "held": [], "test": [], "other": []}
    for label, package in enumerate(PACKAGES):
        files = _files(package, rng)
        for part, (begin, end) in SHARES.items():
            texts = [
                separate(f.read_text(encoding="utf-8", errors="ignore"))
                for f in files[int(begin * len(files)) : int(end * len(files))]
            ]
            for name, kind in ((part, 0), ("other", 1)) if part == "test" else ((part, 0),):
                pieces = [piece for text in texts for piece in _pieces(text[kind], label)]
                most = (train if name == "train" else test) // len(PACKAGES)
                found[name] += rng.sample(pieces, min(most, len(pieces)))
    for pieces in found.values():
        rng.shuffle(pieces)
    data = {name: _batches(pieces, 4 * batch) for name, pieces in found.items()}
    return data | {"fit": data["train"], "train": _batches(found["train"], batch)}


def _batches(pieces: list[Piece], size: int) -> list[Batch]:
    """``LENGTH`` words and the token that asks."""
    batches = []
    for i in range(0, len(pieces), size):
        ids = torch.tensor([[*words, ASK] for words, _ in pieces[i : i + size]])
        labels = torch.tensor([label for _, label in pieces[i : i + size]])
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches
