"""Cautions: a result is worth less than it seems, for a stated reason. Every stage
passes them on.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Caution(BaseModel):
    """A warning that stays attached to a result, instead of being logged once.

    ``headline`` is a clause for a verdict ("the search learned nothing"), ``text``
    gives the figures and what to change.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    headline: str
    text: str

    @property
    def title(self) -> str:
        """The headline without its article, for a badge."""
        return self.headline.removeprefix("the ")

    def __str__(self) -> str:
        return f"{self.headline}: {self.text}"
