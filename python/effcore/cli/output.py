"""The folder that a command writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from effcore.errors import InputError
from effcore.files import check_place


def check_free(out: Path, result: str, *, overwrite: bool, unfinished: Sequence[str] = ()) -> None:
    """Refuses what a command must not write to, before it has computed anything; makes nothing.

    Args:
        result: what only a result of this command has.
        overwrite: a result may be replaced.
        unfinished: what an interrupted command leaves there.

    Raises:
        InputError: ``out`` is a file, cannot be written, holds a result, or is somebody's folder of other things.
    """
    check_place(out)
    if (out / result).exists():
        if not overwrite:
            raise InputError(f"--out {out}: a result is here; --overwrite replaces it")
    elif out.is_dir() and {path.name for path in out.iterdir()} - {".in-progress", *unfinished}:
        raise InputError(f"--out {out}: the folder is not empty and holds no result of this command; choose another")
