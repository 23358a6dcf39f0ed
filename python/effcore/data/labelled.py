"""Texts with labels, for classifiers: a table with two fields, a folder a class, or snippets of the installed packages'
sources.

texts = load_labelled("reviews.jsonl")     # .jsonl, .csv or .parquet with the fields text and label
texts = load_labelled("mail/")             # mail/ham/*.txt, mail/spam/*.txt
texts = load_labelled(None)                # which installed package a snippet of Python comes from
"""

from __future__ import annotations

import csv
import hashlib
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from effcore.data.corpus import held_out
from effcore.data.json_lines import json_lines
from effcore.errors import InputError

Row = tuple[str, str, str]  # text, label, document: rows of one document go to the same side of the split


@dataclass(frozen=True)
class LabelledTexts:
    """Two lists of (text, class number), and the classes' names in the order of their numbers."""

    name: str
    classes: list[str]
    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]

    @property
    def fingerprint(self) -> str:
        """A hash of everything, so that a resumed run trains on the same."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for part in (self.train, self.validation):
            for text, label in part:
                digest.update(f"{label}\0{text}\n".encode(errors="surrogatepass"))
        return digest.hexdigest()[:24]


def load_labelled(
    data: str | Path | None,
    *,
    text_field: str = "text",
    label_field: str = "label",
    validation_fraction: float = 0.05,
    most: int | None = None,
) -> LabelledTexts:
    """Reads labelled texts; which are held out is decided by a hash of the document's name.

    Args:
        most: at most so many texts, chosen evenly at random but always the same ones.

    Raises:
        InputError: no such file, not its format, no such field, fewer than two classes, or nothing left for one side.
    """
    path = None if data is None else Path(data)
    if path is None:
        name, rows = "snippets of installed packages", list(_snippets())
    elif path.is_dir():
        name, rows = str(path), list(_folder(path))
    else:
        name, rows = str(path), list(_table(path, text_field, label_field))
    if most is not None and len(rows) > most:
        rows = random.Random(0).sample(rows, most)
    classes = sorted({label for _, label, _ in rows})
    if len(classes) < 2:
        raise InputError(f"--data {name}: a classifier needs at least 2 classes, found {classes or 'no texts'}")
    number = {label: i for i, label in enumerate(classes)}
    sides: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for text, label, document in rows:
        sides[held_out(document, validation_fraction)].append((text, number[label]))
    for side, which in zip(sides, ("training", "validation"), strict=True):
        if not side:
            raise InputError(f"--data {name}: none of {len(rows)} texts is left for {which}; add texts")
    return LabelledTexts(name, classes, *sides)


def _table(path: Path, text_field: str, label_field: str) -> Iterator[Row]:
    if not path.is_file():
        raise InputError(f"--data {path}: no such file or folder")
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise InputError(f"--data {path}: labelled texts are a folder of folders, or end in {', '.join(readers)}")
    for number, row in enumerate(readers[path.suffix](path), start=1):
        for name in (text_field, label_field):
            if row.get(name) is None:
                raise InputError(f"{path}, row {number}: no field {name!r} (there are {sorted(map(str, row))})")
        text = str(row[text_field])
        yield text, str(row[label_field]), text


def _jsonl(path: Path) -> Iterator[dict]:
    return (row for _, row in json_lines(path))


def _csv(path: Path) -> Iterator[dict]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            yield from csv.DictReader(stream)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file ({error})") from error


def _parquet(path: Path) -> Iterator[dict]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError(f"{path}: reading parquet needs pyarrow (pip install 'effcore[models]')") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except arrow.ArrowInvalid as error:
        raise InputError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from error


def _folder(root: Path) -> Iterator[Row]:
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            try:
                yield path.read_text(encoding="utf-8"), folder.name, path.relative_to(root).as_posix()
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: not UTF-8 text") from error


_LINES = 8  # of a snippet
_LARGEST = 20  # packages
_MOST = 4000  # snippets of a package
_LEFT_OUT = {"test", "tests", "_test", "testing", "__pycache__", "idle_test", "site-packages", "_vendor"}


def _snippets() -> Iterator[Row]:
    """Eight lines each, without those that name the package; files are split whole, so no function is on both sides."""
    roots = {Path(place) for place in sys.path if Path(place).name in ("site-packages", "dist-packages")}
    folders = [
        folder for root in roots if root.is_dir() for folder in root.iterdir() if (folder / "__init__.py").is_file()
    ]
    sized = [(sum(p.stat().st_size for p in _sources(folder)), folder) for folder in folders]
    large = [folder for size, folder in sorted(sized, key=lambda pair: (-pair[0], pair[1].name)) if size > 200_000]
    for folder in sorted(large[:_LARGEST], key=lambda folder: folder.name):
        found = [row for path in _sources(folder) for row in _of_file(path, folder)]
        yield from random.Random(folder.name).sample(found, min(_MOST, len(found)))


def _sources(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if not _LEFT_OUT & set(p.relative_to(folder).parts))


def _of_file(path: Path, package: Path) -> Iterator[Row]:
    name = re.escape(package.name.strip("_").split("_")[0])
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line for line in lines if line.strip() and not re.search(name, line, re.IGNORECASE)]
    document = path.relative_to(package.parent).as_posix()
    for start in range(0, len(lines) - _LINES + 1, _LINES):
        yield "\n".join(lines[start : start + _LINES]), package.name, document
