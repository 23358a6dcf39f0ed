"""A run folder: what lies where, and how it is read back.

config.yaml     everything that the run was started with; ``--resume`` needs nothing else
metrics.jsonl   losses and speed while it trained (:mod:`effcore.training.metrics`)
checkpoint-N/   weights, optimizer, schedules and random states after step N, as safetensors
model/          the trained model and its tokenizer, for ``effcore generate`` and transformers
summary.json    the final numbers; with it a run is finished
report.md       the same for people, with plots/
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from effcore.errors import InputError
from effcore.files import write_atomically
from effcore.training.metrics_file import Row, read_metrics
from effcore.training.recipe import Recipe, recipe_from_dict


@dataclass(frozen=True)
class RunConfig:
    """How a run was started. ``corpus`` is the fingerprint of the text, so that a resumed run trains on the same."""

    method: str
    recipe: Recipe
    model: str | None = None
    data: str | None = None
    corpus: str | None = None


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder, and reading and writing of its small files."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def report_file(self) -> Path:
        return self.path / "report.md"

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def check_free(self, *, overwrite: bool) -> None:
        """Raises InputError where a new run would hit something: another run (unless ``overwrite``), or anything else."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {self.path}: is a file")
        if self.path.is_dir() and any(self.path.iterdir()):
            if not self.config_file.is_file():
                raise InputError(f"--out {self.path}: the folder is not empty and holds no run; choose another")
            if not overwrite:
                raise InputError(
                    f"--out {self.path}: a run is here; continue it with --resume or replace it with --overwrite"
                )

    def create(self, config: RunConfig, *, overwrite: bool) -> None:
        """Makes the folder with its config.yaml. Only a run is ever overwritten.

        Raises:
            InputError: see :meth:`check_free`; or the folder cannot be made there.
        """
        self.check_free(overwrite=overwrite)
        if self.path.is_dir():
            shutil.rmtree(self.path)
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"--out {self.path}: cannot be created ({error.strerror})") from error
        write_atomically(self.config_file, yaml.safe_dump(asdict(config), sort_keys=False))

    def config(self) -> RunConfig:
        """Raises InputError where there is no run, or its config.yaml is damaged."""
        if not self.config_file.is_file():
            raise InputError(f"{self.path}: no run here (no config.yaml)")
        try:
            values = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
            return RunConfig(**{**values, "recipe": recipe_from_dict(values["recipe"], str(self.config_file))})
        except KeyError as error:
            raise InputError(f"{self.config_file}: damaged (there is no {error})") from error
        except (yaml.YAMLError, TypeError, UnicodeDecodeError) as error:
            raise InputError(f"{self.config_file}: damaged ({error})") from error

    def metrics(self) -> list[Row]:
        return read_metrics(self.metrics_file)

    def summary(self, number: str = "tokens_per_second") -> dict[str, Any] | None:
        """The final numbers, or None while the run is not finished.

        Args:
            number: one that only such a run has: ``tokens_per_second`` of language models, ``accuracy`` of classifiers.

        Raises:
            InputError: the file is damaged, or of another kind of run.
        """
        if not self.summary_file.is_file():
            return None
        try:
            found = json.loads(self.summary_file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise InputError(f"{self.summary_file}: damaged ({error.msg})") from error
        if not isinstance(found, dict) or not {"title", number} <= found.keys():
            raise InputError(f"{self.summary_file}: damaged, or of another kind of run (there is no {number})")
        return found
