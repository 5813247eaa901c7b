"""What all configuration tables are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from hwnas.document import explain
from hwnas.errors import ConfigError


class Section(BaseModel):
    """Base of all configuration tables: frozen, typed, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


AnySection = TypeVar("AnySection", bound=Section)


def with_usual(
    given: Any, usual: Mapping[str, Any], handler: Callable[[Any], AnySection]
) -> AnySection:
    """A table whose defaults depend on what else is given: ``usual`` stands in for what
    is not, and does not count as given.
    """
    if not isinstance(given, dict) or not usual:
        return handler(given)
    made = handler({**usual, **given})
    made.model_fields_set.difference_update(usual.keys() - given.keys())
    return made


class Plugin(BaseModel):
    """A plug-in by name with options of its own, which the plug-in's ``Config`` checks
    when it is looked up.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value  # -s search.strategy=fbnet

    def options(self, config: type[BaseModel]) -> Any:
        """The plug-in's own options as its ``config`` model. Raises ConfigError naming
        the wrong one.
        """
        try:
            return config.model_validate(self.model_extra or {})
        except ValidationError as error:
            raise ConfigError(f"options of {self.name!r}: {explain(error, config)}") from error
