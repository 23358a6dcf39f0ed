"""The command line. Only :func:`main` is here, so that ``effcore --help`` starts in a blink; see :mod:`effcore.cli.app`."""

from __future__ import annotations

import sys

# What the extras cli and models bring (pyproject.toml), as it is imported.
_EXTRAS = {
    "typer",
    "rich",
    "matplotlib",
    "yaml",
    "transformers",
    "safetensors",
    "accelerate",
    "datasets",
    "peft",
    "gguf",
}


def main(arguments: list[str] | None = None) -> None:
    """Runs ``effcore`` and exits: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    try:
        from effcore.cli.app import run

        run(arguments)
    except ModuleNotFoundError as error:
        missing = (error.name or "effcore").partition(".")[0]
        if missing == "effcore":
            raise
        hint = "; the commands need pip install 'effcore[cli,models]'" if missing in _EXTRAS else ""
        print(f"effcore: {missing} is not installed{hint}", file=sys.stderr)
        sys.exit(1)
