"""The folder that a command writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from effcore.errors import InputError


def check_free(out: Path, result: str, *, overwrite: bool, unfinished: Sequence[str] = ()) -> None:
    """Refuses what a command must not write to, before it has computed anything; makes nothing.

    Args:
        result: the file that a finished result has.
        overwrite: a result may be replaced.
        unfinished: what an interrupted command leaves there.

    Raises:
        InputError: ``out`` is a file, cannot be written, holds a result, or is somebody's folder of other things.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: not a folder")
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"--out {out}: {above} is {'not writable' if above.is_dir() else 'not a folder'}")
    if (out / result).exists():
        if not overwrite:
            raise InputError(f"--out {out}: a result is here; --overwrite replaces it")
    elif out.is_dir() and {path.name for path in out.iterdir()} - {".in-progress", *unfinished}:
        raise InputError(f"--out {out}: the folder is not empty and holds no result of this command; choose another")
