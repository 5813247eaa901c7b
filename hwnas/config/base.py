"""The base classes of configuration tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hwnas.core.settings import Settings
from hwnas.document import explain
from hwnas.errors import ConfigError

Epochs: TypeAlias = Annotated[float, Field(gt=0, le=1_000_000)]
Images: TypeAlias = Annotated[int, Field(ge=1, le=10**9)]
BatchSize: TypeAlias = Annotated[int, Field(ge=2, le=2**20)]
Processes: TypeAlias = Annotated[int, Field(ge=1, le=1024)]
Rounds: TypeAlias = Annotated[int, Field(ge=1, le=1000)]
Count: TypeAlias = Annotated[int, Field(ge=1, le=10_000_000)]
Weight: TypeAlias = Annotated[float, Field(ge=0, le=1e6)]
# The upper bounds are far beyond any use. They tell a slip of the keyboard from a setting
# before it costs hours, and before a number overflows.


class Section(Settings):
    """Base of all configuration tables."""


AnySection = TypeVar("AnySection", bound=Section)


def with_defaults(
    given: Any, defaults: Mapping[str, Any], handler: Callable[[Any], AnySection]
) -> AnySection:
    """Build a table whose defaults depend on the values of other keys.

    ``defaults`` are those for these values; the keys in ``given`` take precedence.
    Defaults filled in this way do not count as set by the user.
    """
    if not isinstance(given, dict) or not defaults:
        return handler(given)
    section = handler({**defaults, **given})
    # ``hwnas.unused`` checks the keys in this set, and must not blame the user for these
    section.model_fields_set.difference_update(defaults.keys() - given.keys())
    return section


def without_defaults(content: dict[str, Any], unset: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a table without the keys that have their ``unset`` value. Keys that
    were added later are left out, so that the hashes of older runs do not change.
    """
    return {key: value for key, value in content.items() if key not in unset or value != unset[key]}


def check_model_of_file(key: str, source: str | None, model: str | None) -> None:
    """Raise ValueError if ``{key}_model`` names a model and ``key`` no file that is of it."""
    if model is not None and source is None:
        raise ValueError(
            f"{key}_model = {model!r} needs {key}, which is not set; set that to the file, or to"
            f" {model!r}"
        )


class Plugin(BaseModel):
    """The name of a plug-in and its options, which the ``Config`` of the plug-in checks
    when it is looked up.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        # On the command line a name is enough: -s search.strategy=fbnet.
        return {"name": value} if isinstance(value, str) else value

    def options(self, config: type[BaseModel]) -> Any:
        """The options as the plug-in's ``config`` model. Raises ConfigError with the
        name of an invalid option.
        """
        try:
            return config.model_validate(self.model_extra or {})
        except ValidationError as error:
            raise ConfigError(f"options of {self.name!r}: {explain(error, config)}") from error
