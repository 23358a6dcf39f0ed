"""Recipes: every setting of a training run, typed, checked, and readable as YAML.

One recipe serves all methods, so that a comparison changes the method and nothing else. Settings are named by their path,
``training.steps``; where the last part is unique, that is enough (``steps``).
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from effcore.errors import InputError, nearest

_Settings = TypeVar("_Settings")


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of JSON: 2e-5 is one, and the layout 0_0_2_2 is none. YAML 1.1 has that the wrong way."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def _require(ok: bool, setting: str, expected: str, value: object) -> None:
    if not ok:
        raise InputError(f"{setting} must be {expected}, got {value!r}")


def _positive(section: str, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(value > 0, f"{section}.{name}", "positive", value)


@dataclass(frozen=True)
class ModelSettings:
    """A fresh LLaMA; unused where the run starts from a checkpoint (``--model``)."""

    layers: int = 8
    hidden_size: int = 256
    heads: int = 4
    kv_heads: int = 4
    mlp_size: int = 688
    max_length: int = 4096
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        _positive("model", self, "layers", "hidden_size", "heads", "kv_heads", "mlp_size", "max_length")
        _require(
            self.hidden_size % self.heads == 0,
            "model.hidden_size",
            f"a multiple of heads ({self.heads})",
            self.hidden_size,
        )
        _require(
            self.heads % self.kv_heads == 0, "model.heads", f"a multiple of kv_heads ({self.kv_heads})", self.heads
        )
        _require(
            self.hidden_size // self.heads % 2 == 0, "model.hidden_size / heads", "even", self.hidden_size // self.heads
        )


@dataclass(frozen=True)
class DataSettings:
    """What is read from the corpus. ``length`` is in tokens."""

    length: int = 512
    validation_fraction: float = 0.05
    validation_windows: int = 64
    text_field: str = "text"
    label_field: str = "label"  # of labelled texts (swiftlearn)
    separate_documents: bool = False

    def __post_init__(self) -> None:
        _positive("data", self, "validation_windows")
        _require(self.length > 1, "data.length", "at least 2", self.length)
        _require(
            0 < self.validation_fraction < 1, "data.validation_fraction", "between 0 and 1", self.validation_fraction
        )


@dataclass(frozen=True)
class TrainingSettings:
    """The optimization. ``batch_size`` counts windows a process and step; intervals are in steps.

    ``sharded`` spreads parameters, gradients and optimizer state over the processes of a ``torchrun`` (FSDP2); otherwise each
    holds them all (DDP).
    """

    steps: int = 600
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    precision: str = "float32"
    gradient_checkpointing: bool = False
    compile: bool = False
    sharded: bool = False
    seed: int = 0
    log_every: int = 10
    validate_every: int = 100
    checkpoint_every: int = 200
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        _positive("training", self, "steps", "batch_size", "accumulation", "learning_rate", "clip_norm")
        _positive("training", self, "log_every", "validate_every", "checkpoint_every", "keep_checkpoints")
        _require(0 <= self.seed < 2**32, "training.seed", "from 0 to 2**32 - 1", self.seed)
        _require(0 <= self.warmup_ratio < 1, "training.warmup_ratio", "at least 0 and below 1", self.warmup_ratio)
        _require(self.weight_decay >= 0, "training.weight_decay", "at least 0", self.weight_decay)
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"training.{name}", "at least 0 and below 1", getattr(self, name))
        _require(
            self.schedule in ("cosine", "linear", "constant"),
            "training.schedule",
            "cosine, linear or constant",
            self.schedule,
        )
        _require(self.precision in ("float32", "bfloat16"), "training.precision", "float32 or bfloat16", self.precision)


@dataclass(frozen=True)
class EPASSettings:
    """Progressive activation sharing; see :class:`effcore.methods.epas.EPASSchedule`. None means the method's default."""

    mode: str = "qk"
    max_shared: int | None = None
    layers_per_switch: int = 1
    switch_every: int | None = None
    first_switch: int = 0
    layout: str | None = None
    restart_steps: int = 0
    restart_from: float = 0.1

    def __post_init__(self) -> None:
        _require(self.mode in ("qk", "kv"), "epas.mode", "qk or kv", self.mode)


@dataclass(frozen=True)
class ECHOSettings:
    """Gradual conversion to shared keys and values; see :class:`effcore.methods.echo_llama.ECHOSchedule`."""

    start: int | None = None
    steps_per_stage: int | None = None
    first_stage: int = 0
    layout: str | None = None
    distillation: float = 0.0
    drop_unused: bool = True


@dataclass(frozen=True)
class SwiftLearnSettings:
    """Which samples a classifier trains on; see :class:`effcore.methods.swiftlearn.SwiftLearnSampler`, which checks them.

    The run has ``epochs`` epochs; ``training.steps`` is not used.
    """

    keep: float = 0.1
    epochs: int = 10
    warmup_epochs: int = 2
    select: str = "gumbel"
    sigma: float = 1.0
    refresh_every: int | None = None
    refresh: str = "all"
    recording: str = "training"
    detrend: bool = False
    max_weight: float | None = None


@dataclass(frozen=True)
class FlowHNSettings:
    """Parallel attention and SSM; see :class:`effcore.models.FlowHNConfig`. None: the training length; balanced by FLOPs."""

    strategy: str = "fac"
    routing_length: int | None = None
    attention_tokens: int | None = None
    state_size: int = 16

    def __post_init__(self) -> None:
        strategies = ("none", "ae", "fa", "fac", "sequential")
        _require(self.strategy in strategies, "flowhn.strategy", " or ".join(strategies), self.strategy)
        _require(1 <= self.state_size <= 256, "flowhn.state_size", "from 1 to 256", self.state_size)


@dataclass(frozen=True)
class Recipe:
    """All settings of a run. Each command reads the sections that concern it."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    epas: EPASSettings = field(default_factory=EPASSettings)
    echo: ECHOSettings = field(default_factory=ECHOSettings)
    swiftlearn: SwiftLearnSettings = field(default_factory=SwiftLearnSettings)
    flowhn: FlowHNSettings = field(default_factory=FlowHNSettings)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def built_in_recipes() -> list[str]:
    """Names that ``--recipe`` takes besides a path."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in _recipe_folder().iterdir() if entry.name.endswith(".yaml")
    )


def load_recipe(source: str | Path, overrides: list[str] | None = None, *, method: str | None = None) -> Recipe:
    """A recipe by built-in name or by path, with ``key=value`` overrides applied.

    Args:
        overrides: ``["training.steps=100", "mode=kv"]``; values are YAML scalars.
        method: where a short name is in more than one section, the section of this name is meant.

    Raises:
        InputError: no such recipe, not YAML, unknown setting (with the nearest ones), wrong type, or out of range.
    """
    values = _read(source)
    recipe = recipe_from_dict(values, str(source))
    changes: dict[str, dict[str, Any]] = {}
    for override in overrides or []:
        section, name, value = _override(override, method)
        changes.setdefault(section, {})[name] = value
    # All at once: heads=2 and kv_heads=2 are fine together where one after the other is not.
    return replace(
        recipe, **{section: replace(getattr(recipe, section), **values) for section, values in changes.items()}
    )


def recipe_from_dict(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """A recipe out of nested dicts; what is left out has its default."""
    return _from_dict(Recipe, values, "", source)


def _recipe_folder() -> resources.abc.Traversable:
    return resources.files("effcore.cli") / "recipes"


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"--recipe {source}: no such file")
        text = path.read_text(encoding="utf-8", errors="replace")
    else:
        names = built_in_recipes()
        if str(source) not in names:
            raise InputError(
                f"--recipe {source}: no built-in recipe of this name{nearest(str(source), names)} "
                f"(there are {', '.join(names)}; a file must end in .yaml)"
            )
        text = (_recipe_folder() / f"{source}.yaml").read_text(encoding="utf-8")
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(
            f"--recipe {source}{where}: not valid YAML ({getattr(error, 'problem', None) or error})"
        ) from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(
            f"--recipe {source}: expected sections ({', '.join(_names(Recipe))}), got {type(values).__name__}"
        )
    return values


def _names(settings: type) -> list[str]:
    return [entry.name for entry in fields(settings)]


def _from_dict(settings: type[_Settings], values: dict[str, Any], prefix: str, source: str) -> _Settings:
    kinds = typing.get_type_hints(settings)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if name not in kinds:
            raise InputError(f"{source}: unknown setting {path!r}{nearest(str(name), kinds)}")
        kind = kinds[name]
        if is_dataclass(kind):
            if not isinstance(value, dict):
                raise InputError(f"{source}: {path} must be a section with settings, got {value!r}")
            arguments[name] = _from_dict(typing.cast(type, kind), value, f"{path}.", source)
        else:
            arguments[name] = _checked(value, kind, path)
    return settings(**arguments)


def _checked(value: Any, kind: Any, path: str) -> Any:
    """``value`` as the annotated type. Whole floats pass as int ("1e3"), ints as float; nothing else is converted."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    expected = next(option for option in options if option is not type(None))
    if expected is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if expected is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) is not (expected is bool) or not isinstance(value, expected):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise InputError(f"{path} must be {names[expected]}{' or null' if len(options) > 1 else ''}, got {value!r}")
    return value


def _paths() -> Iterator[tuple[str, str]]:
    for section, kind in typing.get_type_hints(Recipe).items():
        for name in _names(kind):
            yield section, name


def _override(override: str, method: str | None) -> tuple[str, str, Any]:
    """Section, name and checked value of one ``key=value``."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"--set {override}: expected key=value, for example training.steps=100")
    section, name = _find(key.strip(), method)
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override}: {text!r} is not a YAML value") from error
    kind = typing.get_type_hints(typing.get_type_hints(Recipe)[section])[name]
    return section, name, _checked(value, kind, f"{section}.{name}")


def _find(key: str, method: str | None) -> tuple[str, str]:
    """Section and name of a setting, given in full or by a unique last part."""
    paths = list(_paths())
    full = [f"{section}.{name}" for section, name in paths]
    if key in full:
        return paths[full.index(key)]
    matches = [path for path in paths if path[1] == key]
    if method is not None and len(matches) > 1:
        matches = [path for path in matches if path[0] not in {"epas", "echo", "flowhn"} - {method}]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise InputError(f"--set {key}: ambiguous, say {' or '.join('.'.join(path) for path in matches)}")
    known = full if "." in key else [name for _, name in paths]
    raise InputError(f"--set {key}: unknown setting{nearest(key, known)}")
