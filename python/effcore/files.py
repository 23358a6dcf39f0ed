"""Files and folders that appear whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from effcore.errors import InputError, disk_is_full


def check_place(out: Path) -> None:
    """Refuses a place where no folder can be written, before anything is computed; makes nothing.

    Raises:
        InputError: ``out`` or what it lies in is no folder, or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: not a folder")
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"--out {out}: {above} is {'not writable' if above.is_dir() else 'not a folder'}")


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file beside its place and renames it: readers see the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        _sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def staged(target: Path, *, is_main: bool = True, barrier: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """A folder to write to. When the block ends well what it holds, files and folders, is moved into ``target``, replacing any
    of the same name; when it fails, or the process dies in it, ``target`` keeps what it had.

    Each entry is moved whole, folders before files: a file can mark that all is there. A process that dies between two moves
    leaves the earlier ones done, and a folder that it was replacing aside, until :func:`recover` or the next ``staged``.

    Where several processes write together all of them enter; ``barrier`` waits for all, and the main one moves.

    Raises:
        OSError: the disk is full.
    """
    staging = target / ".in-progress"
    if is_main:
        recover(target)
        staging.mkdir(parents=True)
    barrier()
    try:
        yield staging
        barrier()
        if is_main:
            _publish(staging, target)
    except BaseException as error:
        if disk_is_full(error):  # safetensors and torch say it in exceptions of their own
            raise OSError(errno.ENOSPC, "the disk is full", str(target)) from error
        raise
    finally:
        if is_main:
            recover(target)
    barrier()


def recover(target: Path) -> None:
    """Clears what a :func:`staged` that died left in ``target``; a folder that was aside without a successor comes back."""
    staging = target / ".in-progress"
    for old in (staging / ".replaced").glob("*"):
        if not (target / old.name).exists():
            old.rename(target / old.name)
    shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, target: Path) -> None:
    for path in staging.rglob("*"):
        _sync(path)  # a rename must not overtake what it publishes
    replaced = staging / ".replaced"
    entries = sorted(staging.iterdir(), key=lambda entry: (entry.is_file(), entry.name))
    replaced.mkdir()
    for entry in entries:
        place = target / entry.name
        if place.is_dir():
            place.rename(replaced / entry.name)
        entry.rename(place)
    _sync(target)


def _sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    if path.is_file() or path.is_dir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
