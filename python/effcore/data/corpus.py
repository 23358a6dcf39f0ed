"""Tokenises a corpus once and keeps it as two flat files, train and validation, that are read through memory maps.

The cache is ``$EFFCORE_CACHE``, else ``$XDG_CACHE_HOME/effcore``, else ``~/.cache/effcore``. An entry is named after a hash of
the files' names, sizes and times, the tokenizer and the split; it is written beside its place and renamed when complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from effcore.data import sources
from effcore.data.byte_tokenizer import encode_bytes, is_byte_tokenizer
from effcore.data.sources import Piece, SourceFile
from effcore.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1  # of the cache; part of the name of each entry
_BATCH_BYTES = 4 << 20  # text that is tokenised in one call


@dataclass(frozen=True)
class Corpus:
    """Tokens of a text, split in two. ``train`` and ``validation`` are read-only memory maps (uint16 or uint32)."""

    name: str
    fingerprint: str
    train: np.ndarray
    validation: np.ndarray
    files: int
    skipped: int
    bytes_per_token: float


@dataclass(frozen=True)
class _Summary:
    name: str
    dtype: str
    train: int
    validation: int
    files: int
    skipped: int
    text_bytes: int


def load_corpus(
    data: str | os.PathLike[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    validation_fraction: float = 0.05,
    text_field: str = "text",
) -> Corpus:
    """Reads and tokenises a corpus, or opens it where this has been done before.

    Args:
        data: a text file, a folder, a ``.jsonl`` or ``.parquet`` file; None means the Python standard library's sources.
        validation_fraction: share of the documents that is held out. Which ones is decided by a hash of their names, at least
            one of several files; a single text file holds out its end instead.
        text_field: field or column of ``.jsonl`` and ``.parquet`` that holds the text.

    Raises:
        InputError: no such file, nothing to read, not UTF-8, not JSON, no such field, or too little text to split.
    """
    if not 0 < validation_fraction < 1:
        raise InputError(f"data.validation_fraction must lie between 0 and 1, got {validation_fraction}")
    path = None if data is None else Path(data)
    files = sources.standard_library() if path is None else sources.list_files(path)
    fingerprint = _fingerprint(files, tokenizer, validation_fraction, text_field)
    folder = cache_folder() / fingerprint
    if not (folder / "corpus.json").is_file():
        name = "the Python standard library" if path is None else str(path)
        _build(folder, name, files, tokenizer, validation_fraction, text_field)
    return _open(folder)


def cache_folder() -> Path:
    """Where tokenised corpora are kept; a folder below the system's temporary one if the home is not writable."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("EFFCORE_CACHE") or Path(home) / "effcore")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / f"effcore-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


def _fingerprint(files: list[SourceFile], tokenizer: PreTrainedTokenizerBase, fraction: float, text_field: str) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {fraction} {text_field} {tokenizer.eos_token_id}".encode())
    digest.update(_vocabulary(tokenizer).encode())
    for file in files:
        digest.update(
            f"{file.path.resolve()}\0{file.name}\0{file.size}\0{file.modified}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()[:24]


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)


def held_out(document: str, fraction: float) -> bool:
    """Whether a document belongs to the validation set: a hash of its name, so that adding files moves no other file."""
    return _number(document) < fraction * 2**64


def _number(document: str) -> int:
    return int.from_bytes(hashlib.sha256(document.encode(errors="surrogateescape")).digest()[:8], "big")


def _only_held_out(files: list[SourceFile], fraction: float) -> str | None:
    """Among a few text files, none of which the hash holds out, the name of the one that comes nearest to it."""
    names = [file.name for file in files]
    if len(files) < 2 or any(sources.is_table(file) or held_out(file.name, fraction) for file in files):
        return None
    return min(names, key=_number)


class _Writer:
    """Appends pieces of text to one token file, in batches that keep a fast tokenizer's threads busy."""

    def __init__(self, stream: BinaryIO, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype):
        self.stream, self.tokenizer, self.dtype = stream, tokenizer, dtype
        self.as_bytes = is_byte_tokenizer(tokenizer)
        self.tokens = 0
        self.text_bytes = 0
        self._batch: list[Piece] = []
        self._batch_bytes = 0

    def add(self, piece: Piece) -> None:
        self._batch.append(piece)
        self._batch_bytes += len(piece.text)
        if self._batch_bytes >= _BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        for piece, ids in zip(self._batch, self._encode([piece.text for piece in self._batch]), strict=True):
            if piece.last and self.tokenizer.eos_token_id is not None:
                ids = np.append(ids, self.dtype.type(self.tokenizer.eos_token_id))
            self.stream.write(ids.tobytes())
            self.tokens += len(ids)
            self.text_bytes += len(piece.text.encode("utf-8", errors="surrogatepass"))
        self._batch, self._batch_bytes = [], 0

    def _encode(self, texts: list[str]) -> Iterator[np.ndarray]:
        if self.as_bytes:
            return (encode_bytes(text).astype(self.dtype) for text in texts)
        if not texts:
            return iter(())
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return (np.asarray(ids, dtype=self.dtype) for ids in encoded["input_ids"])


def _build(
    folder: Path,
    name: str,
    files: list[SourceFile],
    tokenizer: PreTrainedTokenizerBase,
    fraction: float,
    text_field: str,
) -> None:
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    readable = files if len(files) == 1 else [file for file in files if sources.is_text(file)]
    alone, only = len(readable) == 1, _only_held_out(readable, fraction)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        with (
            (partial / "train.bin").open("wb") as train_file,
            (partial / "validation.bin").open("wb") as validation_file,
        ):
            train, validation = (_Writer(file, tokenizer, dtype) for file in (train_file, validation_file))
            for file in readable:
                for piece in _pieces(file, text_field, alone=alone, fraction=fraction):
                    if alone and piece.start is not None:
                        hold = piece.start >= 1 - fraction
                    else:
                        hold = piece.document == only or held_out(piece.document, fraction)
                    (validation if hold else train).add(piece)
            train.flush()
            validation.flush()
        summary = _Summary(
            name,
            dtype.name,
            train.tokens,
            validation.tokens,
            len(readable),
            len(files) - len(readable),
            train.text_bytes + validation.text_bytes,
        )
        if not (summary.train and summary.validation):
            which = "training" if summary.validation else "validation" if summary.train else "training and validation"
            raise InputError(
                f"{name}: no text is left for {which} ({len(readable)} readable files, {summary.text_bytes} bytes, "
                f"validation_fraction {fraction}): add documents or change data.validation_fraction"
            )
        (partial / "corpus.json").write_text(json.dumps(asdict(summary), indent=1))
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "corpus.json").is_file():  # another process was faster: its files are the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _pieces(file: SourceFile, text_field: str, *, alone: bool, fraction: float) -> Iterator[Piece]:
    """The pieces of a file; a text file that is the whole corpus is also cut where its held-out end begins."""
    for piece in sources.read_file(file, text_field):
        if not alone or piece.start is None:
            yield piece
            continue
        size = max(file.size, 1)
        raw = piece.text.encode("utf-8")
        cut = int((1 - fraction - piece.start) * size)
        if not 0 < cut < len(raw):
            yield piece
            continue
        cut = raw.find(b"\n", cut) + 1 or raw.rfind(b"\n", 0, cut) + 1
        head, tail = raw[:cut].decode("utf-8"), raw[cut:].decode("utf-8")
        if head:
            yield Piece(piece.document, head, last=bool(tail), start=piece.start)
        if tail:
            yield Piece(piece.document, tail, last=piece.last, start=1.0)


def _open(folder: Path) -> Corpus:
    try:
        summary = _Summary(**json.loads((folder / "corpus.json").read_text()))
        arrays = []
        for part, tokens in (("train", summary.train), ("validation", summary.validation)):
            array = np.memmap(folder / f"{part}.bin", dtype=summary.dtype, mode="r")
            if len(array) != tokens:
                raise ValueError(f"{part}.bin has {len(array)} tokens, expected {tokens}")
            arrays.append(array)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"the tokenised corpus in {folder} is damaged ({error}): remove the folder and start again"
        ) from error
    return Corpus(
        name=summary.name,
        fingerprint=folder.name,
        train=arrays[0],
        validation=arrays[1],
        files=summary.files,
        skipped=summary.skipped,
        bytes_per_token=summary.text_bytes / max(summary.train + summary.validation, 1),
    )
