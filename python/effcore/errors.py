"""Errors that are the user's to fix. The command line prints them as one line, without a traceback, and exits with 2."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable


class InputError(ValueError):
    """A file, a setting or an argument is wrong. The message is one line that says which, what was expected and what came."""


class RunError(RuntimeError):
    """A run failed for a reason outside the program (a full disk, a loss that is not a number). The message is one line."""


def input_error(error: Exception, where: str = "") -> InputError:
    """What a function of ours refused, as the user's to fix: ``where`` takes the place of the function's name.

    >>> input_error(ValueError("effcore.nn.conv3d: groups must be positive, got 0"), "--groups")
    InputError('--groups: groups must be positive, got 0')
    """
    reason = re.sub(r"^effcore(\.\w+)*: ", "", str(error))
    return InputError(f"{where}: {reason}" if where else reason)


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says so: an OSError, or one of several exceptions of torch and safetensors with that text."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(text in str(error) for text in ("No space left", "File too large", "Disk quota"))


def memory_is_full(error: BaseException) -> bool:
    """Whether an error says that the host's or a device's memory is: a MemoryError, or torch's RuntimeErrors with that text."""
    known = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in known)


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'layers'?"`` for a misspelt name, or an empty string where nothing is near.

    >>> nearest("layesr", ["layers", "heads"])
    "; did you mean 'layers'?"
    """
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
