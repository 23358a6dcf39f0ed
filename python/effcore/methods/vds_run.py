"""What a VDS-TTT run keeps: a folder of JSON lines, from which an interrupted run goes on.

config.json           settings and a hash of the queries
pool-I.jsonl          iteration I: {"query": i, "responses": [{"text", "tokens", "ended"}, ...]}
scores-I.jsonl        {"query": i, "scores": [...]}
selected-I.jsonl      {"query": i, "response": j, "score": s}: what was trained on
adapter-I/            LoRA weights after iteration I
online/               the online mode's last state: adapter, optimizer, and how many queries are done
summary.json          counts of each iteration
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from effcore.errors import InputError
from effcore.files import recover, staged, write_atomically

Row = dict[str, Any]


class Entries(Protocol):
    """Rows by the number of their query, and a way to add one."""

    @property
    def rows(self) -> dict[int, Row]: ...

    def add(self, row: Row) -> None: ...


class Journal:
    """A JSONL file that is appended to; a last line that a crash cut off is dropped when it is opened again."""

    def __init__(self, path: Path | None):
        self.path = path
        self.rows: dict[int, Row] = {}
        if path is not None and path.is_file():
            for row in _whole_lines(path):
                self.rows[row["query"]] = row
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in self.rows.values()))

    def add(self, row: Row) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.rows[row["query"]] = row


def _whole_lines(path: Path) -> Iterator[Row]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def is_run(folder: Path) -> bool:
    """Whether a run's config.json lies there, and not a model's."""
    try:
        return "queries" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


class RunFiles:
    """Paths in a run folder; without a folder nothing is kept.

    Raises:
        InputError: the folder belongs to another run, or is not one.
    """

    def __init__(self, path: Path | None, config: Row):
        self.path = path
        if path is None:
            return
        held = path / "config.json"
        if held.is_file():
            known = json.loads(held.read_text(encoding="utf-8"))
            changed = sorted(name for name in known.keys() | config.keys() if known.get(name) != config.get(name))
            if changed:
                raise InputError(
                    f"{path}: a run with other settings is here ({', '.join(changed)} differ); choose another folder"
                )
            recover(path)  # online/ is replaced after each accepted query
        elif path.is_dir() and any(entry.suffix != ".partial" for entry in path.iterdir()):
            raise InputError(f"{path}: the folder is not empty and holds no run; choose another")
        else:
            path.mkdir(parents=True, exist_ok=True)
            self.write("config.json", config)

    def journal(self, name: str, iteration: int) -> Journal:
        return Journal(None if self.path is None else self.path / f"{name}-{iteration}.jsonl")

    def write(self, name: str, content: Row) -> None:
        if self.path is not None:
            write_atomically(self.path / name, json.dumps(content, indent=1) + "\n")

    def adapter(self, iteration: int) -> Path | None:
        """The adapter of an iteration where it is complete."""
        folder = None if self.path is None else self.path / f"adapter-{iteration}"
        return folder if folder is not None and (folder / "adapter_config.json").is_file() else None

    def publish(self, name: str, save: Any) -> None:
        """The folder ``name`` as ``save(folder)`` writes it, once it is whole."""
        if self.path is not None:
            with staged(self.path) as staging:
                (staging / name).mkdir()
                save(staging / name)
