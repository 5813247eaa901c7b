"""A result that is less than it looks like, said in words that every stage hands on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Caution(BaseModel):
    """A warning that belongs to a result, not to the moment in which it was made.

    ``headline`` is a clause for a verdict ("the search learned nothing"), ``text`` the
    figures and what to change.
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
