"""Files and folders that appear whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from effcore.errors import disk_is_full


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file beside its place and renames it: readers see the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


@contextmanager
def staged(target: Path, *, is_main: bool = True, barrier: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """A folder to write to. When the block ends well what it holds, files and folders, is moved into ``target``, replacing any
    of the same name; when it fails, or the process dies, ``target`` keeps what it had.

    Where several processes write together all of them enter; ``barrier`` waits for all, and the main one moves.

    Raises:
        OSError: the disk is full.
    """
    staging = target / ".in-progress"
    if is_main:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    barrier()
    try:
        yield staging
    except BaseException as error:
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
        if disk_is_full(error):  # safetensors and torch say it in exceptions of their own
            raise OSError(errno.ENOSPC, "the disk is full", str(target)) from error
        raise
    barrier()
    if is_main:
        for entry in list(staging.iterdir()):
            _flush(entry)
            place = target / entry.name
            if place.is_dir():
                place.rename(staging / f"old-{entry.name}")
            entry.rename(place)
        shutil.rmtree(staging, ignore_errors=True)
    barrier()


def _flush(entry: Path) -> None:
    """Waits until a file, or a folder's files, are on the disk: a rename must not overtake what it publishes."""
    for path in [entry, *entry.rglob("*")]:
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
