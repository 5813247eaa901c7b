"""What a search found: the document ``search.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from hwnas.config import Plugin
from hwnas.core.arch import Picks
from hwnas.core.cost import UNITS, Unit, UnitName
from hwnas.core.metric import ACCURACY
from hwnas.core.objective import Objective
from hwnas.document import Document
from hwnas.search.cost_counter import SearchCost
from hwnas.search.learning import Learning


class Candidate(BaseModel):
    """An architecture evaluated by the super-net.

    ``predicted`` is its cost in ``SearchResult.unit``; ``quality`` that of the
    recalibrated network on held-out images, in 0..1, which ``SearchResult.metric``
    names: accuracy, AP or 1 / (1 + loss).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    picks: Picks
    predicted: float
    quality: float
    reward: float
    limits: dict[str, float] = Field({}, description="what search.limits limits, by name")


class SearchResult(Document):
    """What a search found. ``candidates`` are the strategy's proposals, best reward first.

    For comparison, ``random`` are random architectures within the budget, and
    ``random_anywhere`` in the whole space. ``learning`` says whether there is anything in it.
    Version 1 called ``metric`` quality, and a candidate's ``quality`` accuracy,
    whatever it was; up to version 2 every cost was in milliseconds, and its name said
    so; up to version 3 ``random_anywhere`` was called spread, and ``cost.evaluated``
    judged.
    """

    SCHEMA: ClassVar[str] = "hwnas.search"
    VERSION: ClassVar[int] = 4

    strategy: str
    metric: str = Field(ACCURACY, description="what the candidates' quality is")
    space_sha256: str
    objective: Objective
    unit: UnitName = Field(
        "ms",
        description="of all costs here: of the target, of what is reachable, and of the candidates",
    )
    target: float
    tolerance: float
    reachable: tuple[float, float]
    table_sha256: str | None = Field(
        None, description="the table that predicts latency; none where costs are counted"
    )
    steps: int
    seed: int
    finder: Plugin | None = Field(
        None, description="what found the candidates, where it was not the strategy itself"
    )
    weights_sha256: str | None = Field(
        None, description="the super-net file, where an already trained one was used"
    )
    cost: SearchCost | None = Field(
        None, description="of training, finding and the last ranking; see search/cost_counter.py"
    )
    learning: Learning | None = Field(
        None, description="whether it learned anything; see search/learning.py"
    )
    candidates: tuple[Candidate, ...] = Field(min_length=1)
    random: tuple[Candidate, ...] = ()
    random_anywhere: tuple[Candidate, ...] = ()

    @property
    def shown_in(self) -> Unit:
        """The unit of all costs, with how it is shown."""
        return UNITS[self.unit]

    @classmethod
    def migrate(cls, version: int, content: dict[str, Any]) -> dict[str, Any]:
        """The names of versions 1 to 3."""
        names = {
            "target_ms": "target",
            "reachable_ms": "reachable",
            "spread": "random_anywhere",
        }
        of_candidates = {"latency_ms": "predicted"}
        content["cost"] = _renamed(content.get("cost"), {"judged": "evaluated"})
        if version == 1:
            content["metric"] = content.pop("quality", ACCURACY)
            of_candidates |= {"accuracy": "quality"}
        for group in ("candidates", "random", "spread"):
            if isinstance(content.get(group), list):
                content[group] = [
                    _renamed(candidate, of_candidates) for candidate in content[group]
                ]
        renamed: dict[str, Any] = _renamed(content, names)
        return renamed


def _renamed(content: Any, names: Mapping[str, str]) -> Any:
    """An object with other names; what is none stays as it is, to be refused like any other."""
    if not isinstance(content, dict):
        return content
    return {names.get(name, name): value for name, value in content.items()}
