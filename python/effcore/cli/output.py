"""The folder that a command writes."""

from __future__ import annotations

from pathlib import Path

from effcore.errors import InputError


def check_free(out: Path, result: str, *, overwrite: bool) -> None:
    """Raises InputError where ``out`` is a file, or holds a finished ``result`` (a file's name) that was not to be replaced."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: not a folder")
    if (out / result).exists() and not overwrite:
        raise InputError(f"--out {out}: a result is here; --overwrite replaces it")
