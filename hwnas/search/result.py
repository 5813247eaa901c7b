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

    ``predicted`` is its predicted cost in ``SearchResult.unit``. ``quality`` is that of
    the network with recalibrated BN on held-out images, in 0..1; ``SearchResult.metric``
    names what it is: accuracy, AP or 1 / (1 + loss).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    picks: Picks
    predicted: float
    quality: float
    reward: float
    limits: dict[str, float] = Field({}, description="values of what search.limits limits, by name")


class SearchResult(Document):
    """What a search found.

    ``candidates`` are the proposals, best reward first. For comparison, ``random`` are
    random architectures within the budget, and ``random_anywhere`` are from the whole
    space. ``learning`` says whether the search has learned anything.

    Version 1 called ``metric`` quality, and a candidate's ``quality`` accuracy, whatever
    the metric was. Up to version 2, all costs were in milliseconds, as their names said.
    Up to version 3, ``random_anywhere`` was called spread and ``cost.evaluated`` judged.
    """

    SCHEMA: ClassVar[str] = "hwnas.search"
    VERSION: ClassVar[int] = 4

    strategy: str
    metric: str = Field(ACCURACY, description="the metric of the candidates' quality")
    space_sha256: str
    objective: Objective
    unit: UnitName = Field(
        "ms",
        description="the unit of all costs: target, reachable and the candidates' predicted",
    )
    target: float
    tolerance: float
    reachable: tuple[float, float]
    table_sha256: str | None = Field(
        None, description="the table that predicts latency; none if costs are counted"
    )
    steps: int
    seed: int
    finder: Plugin | None = Field(
        None, description="the finder of the candidates, if not the strategy itself"
    )
    weights_sha256: str | None = Field(
        None, description="the super-net file, if an already trained one was used"
    )
    cost: SearchCost | None = Field(
        None,
        description="cost of training, finding and the final ranking; see search/cost_counter.py",
    )
    learning: Learning | None = Field(
        None, description="whether the search learned anything; see search/learning.py"
    )
    candidates: tuple[Candidate, ...] = Field(min_length=1)
    random: tuple[Candidate, ...] = ()
    random_anywhere: tuple[Candidate, ...] = ()

    @property
    def shown_in(self) -> Unit:
        """The unit of all costs, which knows how to format them."""
        return UNITS[self.unit]

    @classmethod
    def migrate(cls, version: int, content: dict[str, Any]) -> dict[str, Any]:
        """Rename the keys of versions 1 to 3."""
        names = {
            "target_ms": "target",
            "reachable_ms": "reachable",
            "spread": "random_anywhere",
        }
        candidate_names = {"latency_ms": "predicted"}
        content["cost"] = _renamed(content.get("cost"), {"judged": "evaluated"})
        if version == 1:
            content["metric"] = content.pop("quality", ACCURACY)
            candidate_names["accuracy"] = "quality"
        for group in ("candidates", "random", "spread"):
            rows = content.get(group)
            if isinstance(rows, list):
                content[group] = [_renamed(row, candidate_names) for row in rows]
        renamed: dict[str, Any] = _renamed(content, names)
        return renamed


def _renamed(content: Any, names: Mapping[str, str]) -> Any:
    """A JSON object with renamed keys. Anything else is returned unchanged, and fails the
    validation that follows.
    """
    if not isinstance(content, dict):
        return content
    return {names.get(name, name): value for name, value in content.items()}
