"""The experiment: its tables, and how it is read from TOML and the command line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from hwnas.config.base import Section
from hwnas.config.formats import FORMATS, NMS_FORMATS, Format
from hwnas.config.old_keys import with_new_keys
from hwnas.config.search import SearchConfig
from hwnas.config.study import ShrinkConfig, StudyConfig
from hwnas.config.tables import (
    BOX_AUGMENTATIONS,
    IMAGE_LABELS,
    DataConfig,
    DetectorConfig,
    DeviceConfig,
    ExportConfig,
    ProfileConfig,
    SpaceConfig,
    ValidateConfig,
)
from hwnas.config.tasks import TaskName, network_kind
from hwnas.config.training import TrainConfig
from hwnas.core.size import Rectangle
from hwnas.document import decoded_text, explain, merged, nearest, quoted_path
from hwnas.errors import ConfigError
from hwnas.printable import quoted, shortened
from hwnas.resources import resource_path

LONGEST_NAME = 200
"""Bytes of the longest name: file systems have 255, and earlier results get a suffix."""

LARGEST_BYTES = 2**24
"""More than any configuration has. What is read of /dev/zero, for instance."""

RECIPES = "configs/recipes"
"""The folder of the recipes, one file each."""

DEEPEST = 32
"""Levels of nested tables and lists. No configuration has more than eight."""


def checked_name(name: str) -> str:
    """The name of an experiment, which is also the name of its run folder below ``runs``.
    Raises ValueError if it would lead elsewhere or cannot be displayed.
    """
    leads_elsewhere = name in (".", "..") or "/" in name or "\\" in name
    is_blank = not name.strip()
    if leads_elsewhere or is_blank or not name.isprintable() or len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"a name becomes the name of a folder; give 1 to {LONGEST_NAME} printable characters"
            " without / and \\, and choose another place for the results with --out"
        )
    return name


class Experiment(Section):
    """A whole experiment: everything that ``hwnas run`` needs to know."""

    name: Annotated[str, AfterValidator(checked_name)] = Field(
        "experiment", description="title of the report, and name of the run folder"
    )
    task: TaskName = Field(
        "classify",
        description="classify: one label per image; detect: boxes with labels; or a plug-in's task",
    )
    recipe: str | None = Field(
        None,
        max_length=100,
        # a run folder keeps what the recipe said, and need not know its name
        exclude=True,
        description=(
            "named settings below those of this file, such as fbnet, darts or small-data; see"
            " configs/recipes"
        ),
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of all random numbers")
    checkpoint_seconds: float = Field(
        20.0,
        ge=0,
        le=1e9,  # never
        description="seconds between checkpoints of a running search or training",
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
    def _check_task(self) -> Self:
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
            raise ValueError(
                "train.backbone initialises a detector; remove it, or set task = 'detect'"
            )
        nms_formats = [name for name in self.export.formats or () if name in NMS_FORMATS]
        if nms_formats and not detects:
            raise ValueError(
                f"export.formats has {nms_formats[0]!r}, which is for detectors; remove it, or set"
                " task = 'detect'"
            )
        # refused instead of ignored: these keys would silently mean nothing
        if detects and self.train.teacher is not None:
            raise ValueError(
                "train.teacher teaches classifiers; remove it, or set task = 'classify'"
            )
        if self.task != "classify" and self.train.loss != "cross_entropy":
            raise ValueError(
                f"train.loss = {self.train.loss!r} is for image labels, and task = {self.task!r}"
                " has a loss of its own; remove it, or set task = 'classify'"
            )
        augmentation = self.train.augmentation
        of_labels = augmentation.without_mosaic.model_dump(exclude_defaults=True)
        if detects and of_labels:
            key, value = next(iter(of_labels.items()))
            raise ValueError(
                f"train.augmentation.{key} = {value!r} is for classifiers; remove it, and choose"
                f" data.augment = {', '.join(BOX_AUGMENTATIONS)} or none for a detector"
            )
        if not detects and augmentation.mosaic > 0:
            raise ValueError(
                f"train.augmentation.mosaic = {augmentation.mosaic:g} is for detectors; remove it,"
                " or choose train.augmentation.mixup or cutmix for a classifier"
            )
        if detects and self.train.progressive.start < 1:
            raise ValueError(
                f"train.progressive.start = {self.train.progressive.start:g} is for classifiers;"
                " remove it, or set task = 'classify'"
            )
        if self.train.progressive.start < 1 and isinstance(self.data.resolution, Rectangle):
            raise ValueError(
                f"train.progressive.start = {self.train.progressive.start:g} is for square images,"
                f" and data.resolution is {self.data.resolution}; remove one of them"
            )
        if detects and self.export.softmax:
            raise ValueError(
                "export.softmax is for classifiers, and a detector's files have scores already;"
                " remove it"
            )
        if not detects and self.search.backbone is not None:
            raise ValueError(
                "search.backbone initialises a super-net of detectors; remove it, or set task ="
                " 'detect'"
            )
        if detects and self.search.supernet.dropout > 0:
            raise ValueError(
                "search.supernet.dropout is before the classifier, which a detector does not have;"
                " remove it"
            )
        initial = []
        if self.train.pretrained is not None:
            initial.append("train.pretrained")
        if self.train.backbone is not None:
            initial.append("train.backbone")
        if self.train.weights != "scratch":
            initial.append("train.weights = 'supernet'")
        if len(initial) > 1:
            raise ValueError(
                f"{initial[0]} and {initial[1]} both set the initial weights; remove one of them"
            )
        return self

    @property
    def export_formats(self) -> tuple[Format, ...]:
        """The configured formats, or by default all formats of the task."""
        if self.export.formats:
            return self.export.formats
        if network_kind(self.task) == "detect":
            return (*FORMATS, *NMS_FORMATS)
        return FORMATS


WHOLE = ("strategy", "objective", "optimizer", "budget", "schedule")
"""Tables that are replaced as a whole: options of another strategy would be errors."""


def recipe_names() -> list[str]:
    """The names of the recipes that ship with hwnas."""
    return sorted(path.stem for path in resource_path(RECIPES).glob("*.toml"))


def _recipe(name: Any) -> dict[str, Any]:
    """The settings of a recipe. Raises ConfigError if there is none of that name."""
    known = recipe_names()
    if name not in known:
        raise ConfigError(f"recipe = {quoted(name)} is unknown; {nearest(str(name), known)}")
    return tomllib.loads((resource_path(RECIPES) / f"{name}.toml").read_text())


def load_experiment(path: str | Path | None, overrides: list[str] | None = None) -> Experiment:
    """Read an experiment from a TOML file (None: only defaults). ``overrides`` are
    ``key.path=value`` strings.

    Raises ConfigError with a one-sentence message.
    """
    overrides = overrides or []
    file_content: dict[str, Any] = {}
    if path is not None:
        try:
            with resolve_path(Path(path)).open("rb") as file:
                text = decoded_text(file.read(LARGEST_BYTES))
            file_content = tomllib.loads(text)
        except FileNotFoundError as error:
            raise ConfigError(
                f"configuration {path} does not exist: check the path, or see 'hwnas run --help'."
            ) from error
        # a ValueError: bad TOML or UTF-8, or an integer of thousands of digits
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"configuration {quoted_path(path)} is not valid TOML: {error}."
            ) from error
        _check_depth(file_content, f"configuration {path}")
        file_content = with_new_keys(file_content, str(path))
    content = file_content
    for override in overrides:
        parsed = _parse_override(override)
        _check_depth(parsed, f"-s {quoted(override)}")
        content = merged(content, with_new_keys(parsed, f"-s {override}"), replace=WHOLE)
    if content.get("recipe") is not None:
        content = merged(_recipe(content["recipe"]), content, replace=WHOLE)
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        source = str(path)
        if not _has_error(file_content, error):
            causes = [f"-s {shortened(text)}" for text in _causes(overrides, error)]
            # without any override, the file contradicts its recipe
            source = ", ".join(causes) or f"recipe = {content.get('recipe')!r}"
        raise ConfigError(f"{source}: {explain(error, Experiment)}") from error


def _check_depth(content: Any, source: str) -> None:
    """Raise ConfigError if a parsed configuration has more than ``DEEPEST`` levels: what
    reads it would run out of stack.
    """
    level = [content]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        level = inner
    if level:
        raise ConfigError(f"{source} is nested more than {DEEPEST} levels deep: correct it.")


def keys_given(section: Section) -> dict[str, Any]:
    """The keys that the user set, with their values, spelt as in a file.

    A table that is not a ``Section``, such as that of a plug-in or an objective, is one
    key.
    """
    given: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        if name not in section.model_fields_set:
            continue
        value = getattr(section, name)
        key = field.alias or name
        if isinstance(value, Section):
            for inner_key, inner_value in keys_given(value).items():
                given[f"{key}.{inner_key}"] = inner_value
        else:
            given[key] = value
    return given


def all_keys(table: type[BaseModel] = Experiment) -> tuple[str, ...]:
    """Every key that ``keys_given`` may return."""
    keys: list[str] = []
    for name, field in table.model_fields.items():
        key = field.alias or name
        inner_table = _section_type(field.annotation)
        if inner_table is None:
            keys.append(key)
        else:
            keys += [f"{key}.{inner_key}" for inner_key in all_keys(inner_table)]
    return tuple(keys)


def _section_type(annotation: Any) -> type[Section] | None:
    """The type of a table; None for a key with a value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return None


def _has_error(content: dict[str, Any], error: ValidationError) -> bool:
    """Whether the file alone, without the overrides, already has the first error of
    ``error``.
    """
    first = error.errors()[0]
    try:
        Experiment.model_validate(content)
    except ValidationError as own_error:
        for own in own_error.errors():
            if (own["loc"], own["msg"]) != (first["loc"], first["msg"]):
                continue
            # The input of an error in a whole table contains other keys, too, which an
            # override may have changed without causing the error.
            if own["input"] == first["input"] or isinstance(first["input"], dict):
                return True
    return False


def _causes(overrides: list[str], error: ValidationError) -> list[str]:
    """The override that set the wrong value. If the error concerns a whole table, all
    overrides that set something in it; if neither is found, all overrides.
    """
    location = [str(part) for part in error.errors()[0]["loc"]]
    of_value = []
    in_table = []
    for text in overrides:
        key = text.partition("=")[0].strip().split(".")
        if location and key[0] == location[0] and _is_subsequence(key, location):
            of_value.append(text)
        if key[: len(location)] == location:
            in_table.append(text)
    # The last override of a key wins, so only that one can be wrong.
    return of_value[-1:] or in_table or overrides


def _is_subsequence(key: list[str], location: list[str]) -> bool:
    """Whether ``location`` contains the parts of ``key`` in their order, possibly with
    other parts in between: pydantic adds the tags of unions.
    """
    parts = iter(location)
    # ``in`` consumes the iterator up to the match.
    return all(part in parts for part in key)


def resolve_path(path: Path) -> Path:
    """The path itself, or the file of the package for ``configs/...`` if the path does
    not exist, so that these paths also work without a checkout.
    """
    if path.parts[:1] != ("configs",) or path.exists():
        return path
    return resource_path("configs").joinpath(*path.parts[1:])


def _parse_override(text: str) -> dict[str, Any]:
    """The nested content of ``key.path=value``."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"-s {quoted(text)} is not KEY=VALUE; write for instance -s search.target_ms=1.5."
        )
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError, KeyError):
        # A string without quotes, which a shell would remove anyway.
        parsed = value
    content: Any = parsed
    for part in reversed(key.strip().split(".")):
        content = {part: content}
    return dict(content)
