"""Where text comes from: files are listed first (their names, sizes and times identify a corpus), then read lazily.

A *document* is a source file, a line of a ``.jsonl`` file or a row of a ``.parquet`` file. Long documents arrive in
pieces, so that no more than a few MB are in memory at a time.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from effcore.data.json_lines import json_lines
from effcore.errors import InputError

PIECE_BYTES = 1 << 20
_TABLES = {".jsonl", ".ndjson", ".parquet"}
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "node_modules"}


@dataclass(frozen=True)
class Piece:
    """Part of a document. ``document`` names it; ``last`` says that it ends here; ``start`` is its offset in the file,
    a fraction from 0 to 1, in plain text files, else None."""

    document: str
    text: str
    last: bool = True
    start: float | None = None


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus: ``name`` is relative to the folder that was given, and stable across machines."""

    path: Path
    name: str
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path, root: Path) -> SourceFile:
        stat = path.stat()
        return cls(path, path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns)


def standard_library() -> list[SourceFile]:
    """The sources of the running Python's standard library, without its tests and installed packages (about 10 MB)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [SourceFile.of(path, root) for path in _walk(root) if path.suffix == ".py"]
    if not files:
        raise InputError(f"this Python has no standard library sources under {root}; pass your own text with --data")
    return files


def list_files(path: Path) -> list[SourceFile]:
    """The files of a corpus that the user names: one file, or all files below a folder, in the order of their names.

    Raises:
        InputError: the path does not exist, is not readable or holds nothing.
    """
    try:
        if path.is_dir():
            files = [SourceFile.of(entry, path) for entry in _walk(path)]
            files = [file for file in files if file.size > 0]
            if not files:
                raise InputError(f"--data {path}: the folder holds no files with text")
            return files
        if path.is_file():
            file = SourceFile.of(path, path.parent)
            if file.size == 0:
                raise InputError(f"--data {path}: the file is empty")
            return [file]
    except PermissionError as error:
        raise InputError(f"--data {path}: permission denied ({error.filename})") from error
    raise InputError(f"--data {path}: no such file or folder")


def read_file(file: SourceFile, text_field: str) -> Iterator[Piece]:
    """The documents of one file, by its ending: ``.jsonl``, ``.parquet``, else UTF-8 text.

    Raises:
        InputError: naming the file, the line and what was expected.
    """
    try:
        if file.path.suffix == ".parquet":
            yield from _read_parquet(file, text_field)
        elif is_table(file):
            yield from _read_jsonl(file, text_field)
        else:
            yield from _read_text(file)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(
            f"{file.path}: not UTF-8 text (byte 0x{byte:02x} at offset {error.start} of a piece)"
        ) from error
    except PermissionError as error:
        raise InputError(f"{file.path}: permission denied") from error


def is_table(file: SourceFile) -> bool:
    """Whether the file holds many documents."""
    return file.path.suffix in _TABLES


def is_text(file: SourceFile) -> bool:
    """Whether a file found in a folder is worth reading: a table, or bytes that look like UTF-8 text."""
    if is_table(file):
        return True
    with file.path.open("rb") as stream:
        head = stream.read(8192)
    if b"\0" in head:
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3  # a character cut in two by the end of the head
    return True


def _walk(root: Path) -> Iterator[Path]:
    """All visible files below ``root``, in the order of their relative names; links to folders are not followed."""
    for folder, folders, names in root.walk() if hasattr(root, "walk") else _walk_311(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("."))
        for name in sorted(names):
            path = folder / name
            if not name.startswith(".") and path.is_file():
                yield path


def _walk_311(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    import os

    for folder, folders, names in os.walk(root):
        yield Path(folder), folders, names


def _read_text(file: SourceFile) -> Iterator[Piece]:
    offset = 0
    with file.path.open(encoding="utf-8", newline="") as stream:
        lines = stream.readlines(PIECE_BYTES)
        while lines:
            text = "".join(lines)
            lines = stream.readlines(PIECE_BYTES)
            yield Piece(file.name, text, last=not lines, start=offset / max(file.size, 1))
            offset += len(text.encode("utf-8"))


def _read_jsonl(file: SourceFile, text_field: str) -> Iterator[Piece]:
    for number, row in json_lines(file.path):
        if not isinstance(row.get(text_field), str):
            found = type(row[text_field]).__name__ if text_field in row else f"only {sorted(row)}"
            raise InputError(f"{file.path}, line {number}: expected a string in field {text_field!r}, got {found}")
        yield Piece(f"{file.name}:{number}", row[text_field])


def _read_parquet(file: SourceFile, text_field: str) -> Iterator[Piece]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError(f"{file.path}: reading parquet needs pyarrow (pip install 'effcore[models]')") from error
    try:
        table = parquet.ParquetFile(file.path)
        names = table.schema_arrow.names
        if text_field not in names:
            raise InputError(f"{file.path}: expected a column {text_field!r}, got {names}")
        kind = table.schema_arrow.field(text_field).type
        if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
            raise InputError(f"{file.path}: column {text_field!r} must hold strings, got {kind}")
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                row += 1
                if text:
                    yield Piece(f"{file.name}:{row}", text)
    except arrow.ArrowInvalid as error:
        raise InputError(f"{file.path}: not a parquet file ({str(error).splitlines()[0]})") from error
