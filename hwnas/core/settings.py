"""The base class of everything that a configuration consists of."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Settings(BaseModel):
    """A table of a configuration: frozen and typed, without unknown keys, NaN or
    infinity. ``true`` and ``false`` are not numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, content: Any) -> Any:
        # pydantic would take true for 1, because Python's bool is an int
        if isinstance(content, dict):
            for name, field in cls.model_fields.items():
                key = field.alias or name
                if _has_truth(content.get(key)) and not _takes_truth(field.annotation):
                    raise PydanticCustomError(
                        "truth_for_a_number",
                        "true and false are not possible for {key}; give another value",
                        {"key": key},
                    )
        return content


def _has_truth(value: Any) -> bool:
    """Whether a parsed value is a bool or contains one."""
    if isinstance(value, list | tuple):
        return any(_has_truth(item) for item in value)
    if isinstance(value, dict):
        return any(_has_truth(item) for item in value.values())
    return isinstance(value, bool)


def _takes_truth(annotation: Any) -> bool:
    """Whether a type may contain a bool: it is ``bool`` or ``Any``, or a table, which
    checks its own values.
    """
    if annotation is Any or annotation is bool:
        return True
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return True
    return any(_takes_truth(argument) for argument in get_args(annotation))
