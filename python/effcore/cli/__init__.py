"""The command line. Only :func:`main` is here, so that ``effcore --help`` starts in a blink; see :mod:`effcore.cli.app`."""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> None:
    """Runs ``effcore`` and exits: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    from effcore.cli.app import run

    run(arguments)
