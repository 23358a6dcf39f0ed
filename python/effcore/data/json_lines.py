"""JSON lines, one object a line; a bad line is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effcore.errors import InputError


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line, counted from 1; blank lines are left out.

    Raises:
        InputError: the file is not UTF-8, or a line is no JSON object.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                place = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from error
                if not isinstance(row, dict):
                    raise InputError(f"{place}: expected an object, got {type(row).__name__}")
                yield number, row
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x})") from error
