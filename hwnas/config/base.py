"""What all configuration tables are made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from hwnas.document import explain
from hwnas.errors import ConfigError


class Section(BaseModel):
    """Base of all configuration tables: frozen, typed, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Plugin(BaseModel):
    """A plug-in by name with options of its own, which the plug-in's ``Config`` checks when it is looked up."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value  # -s search.strategy=fbnet

    def options(self, config: type[BaseModel]) -> Any:
        """The plug-in's own options as its ``config`` model. Raises ConfigError naming the wrong one."""
        try:
            return config.model_validate(self.model_extra or {})
        except ValidationError as error:
            raise ConfigError(f"options of {self.name!r}: {explain(error, config)}") from error
