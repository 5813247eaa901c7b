"""An experiment from its TOML file and the command line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from hwnas.config.base import Section
from hwnas.config.formats import FORMATS, NMS_FORMATS, Format
from hwnas.config.old_keys import with_new_keys
from hwnas.config.search import SearchConfig
from hwnas.config.study import ShrinkConfig, StudyConfig
from hwnas.config.tables import (
    IMAGE_LABELS,
    DataConfig,
    DetectorConfig,
    DeviceConfig,
    ExportConfig,
    ProfileConfig,
    SpaceConfig,
    TrainConfig,
    ValidateConfig,
)
from hwnas.config.tasks import TaskName, network_kind
from hwnas.document import explain, merged
from hwnas.errors import ConfigError
from hwnas.resources import resource_path


class Experiment(Section):
    """A whole experiment: what ``hwnas run`` needs to know."""

    name: str = "experiment"
    task: TaskName = Field("classify", description="one label per image, or boxes with labels")
    seed: int = Field(0, ge=0, lt=2**31)
    checkpoint_seconds: float = Field(
        20.0, ge=0, description="how often a running search or training saves its state"
    )
    space: SpaceConfig = SpaceConfig()
    device: DeviceConfig = DeviceConfig()
    data: DataConfig = DataConfig()
    profile: ProfileConfig = ProfileConfig()
    search: SearchConfig = SearchConfig()
    detector: DetectorConfig = DetectorConfig()
    train: TrainConfig = TrainConfig()
    export: ExportConfig = ExportConfig()
    validation: ValidateConfig = Field(ValidateConfig(), alias="validate")
    study: StudyConfig = StudyConfig()
    shrink: ShrinkConfig = ShrinkConfig()

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        detects = network_kind(self.task) == "detect"
        if detects and self.data.name in IMAGE_LABELS:
            raise ValueError(
                f"task = {self.task!r} needs boxes, and data.name = {self.data.name!r} has none;"
                " choose data.name = 'coco'"
            )
        if not detects and self.data.name == "coco":
            raise ValueError(
                "data.name = 'coco' has boxes instead of one label per image; set task = 'detect'"
            )
        if not detects and self.train.backbone is not None:
            raise ValueError("train.backbone begins a detector; remove it, or set task = 'detect'")
        of_boxes = [
            name for name in self.export.formats or () if name in NMS_FORMATS and not detects
        ]
        if of_boxes:
            raise ValueError(
                f"export.formats has {of_boxes[0]!r}, which is for boxes; remove it, or set task ="
                " 'detect'"
            )
        if detects and self.export.softmax:
            raise ValueError(
                "export.softmax is for classifiers, and a detector's files have scores already;"
                " remove it"
            )
        if not detects and self.search.backbone is not None:
            raise ValueError(
                "search.backbone begins a super-net of detectors; remove it, or set task = 'detect'"
            )
        if detects and self.search.supernet.dropout > 0:
            raise ValueError(
                "search.supernet.dropout is before a classifier, and a detector has none; remove it"
            )
        if self.train.backbone is not None and self.train.weights != "scratch":
            raise ValueError(
                "train.backbone and train.weights = 'supernet' both say what to begin with; remove"
                " one of them"
            )
        return self

    @property
    def export_formats(self) -> tuple[Format, ...]:
        """The configured formats, else all of the task's."""
        return self.export.formats or (
            (*FORMATS, *NMS_FORMATS) if network_kind(self.task) == "detect" else FORMATS
        )


def load_experiment(path: str | Path | None, overrides: list[str] | None = None) -> Experiment:
    """Read an experiment from TOML; ``overrides`` are ``key.path=value`` strings.
    Raises ConfigError in one sentence.
    """
    content: dict[str, Any] = {}
    if path is not None:
        try:
            content = tomllib.loads(resolve_path(Path(path)).read_text())
            content = with_new_keys(content, str(path))
        except FileNotFoundError as error:
            raise ConfigError(
                f"configuration {path} does not exist: check the path, or see 'hwnas run --help'."
            ) from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"configuration {path} is not valid TOML: {error}.") from error
    set_content = content
    for override in overrides or []:
        set_content = merged(
            set_content,
            with_new_keys(_override(override), f"-s {override}"),
            replace=("strategy", "objective", "optimizer", "budget"),
        )
    try:
        return Experiment.model_validate(set_content)
    except ValidationError as error:
        source = (
            str(path)
            if _is_wrong(content, error)
            else ", ".join(f"-s {text}" for text in _to_blame(overrides or [], error))
        )
        raise ConfigError(f"{source}: {explain(error, Experiment)}") from error


def keys_given(section: Section) -> dict[str, Any]:
    """The keys that were given, not left at their default, as they are written in a
    file, with their values.

    A table that is no ``Section``, such as a plug-in's or an objective, is one key.
    """
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), field.alias or name
        if name in section.model_fields_set:
            found |= (
                {f"{key}.{inner}": each for inner, each in keys_given(value).items()}
                if isinstance(value, Section)
                else {key: value}
            )
    return found


def all_keys(table: type[BaseModel] = Experiment) -> tuple[str, ...]:
    """Every key that ``keys_given`` may name."""
    found: list[str] = []
    for name, field in table.model_fields.items():
        key, inner = field.alias or name, _table(field.annotation)
        found += [key] if inner is None else [f"{key}.{each}" for each in all_keys(inner)]
    return tuple(found)


def _table(annotation: Any) -> type[Section] | None:
    """The table that a key is, None where it is a value."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _is_wrong(content: dict[str, Any], error: ValidationError) -> bool:
    """Whether a configuration has an error by itself, without what the command line sets."""
    try:
        Experiment.model_validate(content)
    except ValidationError as own:
        first = error.errors()[0]
        alike = [
            each
            for each in own.errors()
            if (each["loc"], each["msg"]) == (first["loc"], first["msg"])
        ]
        # tables hold other keys, too
        return any(
            each["input"] == first["input"] or isinstance(first["input"], dict) for each in alike
        )
    return False


def _to_blame(overrides: list[str], error: ValidationError) -> list[str]:
    """The override whose value is wrong; where a rule of a whole table is broken, all
    that set something in it.
    """
    place = [str(part) for part in error.errors()[0]["loc"]]
    keys = {text: text.partition("=")[0].strip().split(".") for text in overrides}
    of_value = [
        text for text, key in keys.items() if place and key[0] == place[0] and _in_order(key, place)
    ]
    return (
        of_value[-1:]
        or [text for text, key in keys.items() if key[: len(place)] == place]
        or overrides
    )


def _in_order(key: list[str], place: list[str]) -> bool:
    """Whether a place holds the parts of a key; tags of unions stand between them."""
    parts = iter(place)
    return all(part in parts for part in key)


def resolve_path(path: Path) -> Path:
    """The path itself, or, for ``configs/...`` where there is no checkout, the one that
    ships with the package.
    """
    if path.exists() or path.parts[:1] != ("configs",):
        return path
    return resource_path("configs").joinpath(*path.parts[1:])


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"-s {text!r} is not KEY=VALUE; write for instance -s search.target_ms=1.5."
        )
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    out: Any = parsed
    for part in reversed(key.strip().split(".")):
        out = {part: out}
    return dict(out)
