"""What a search found: the document ``search.json``."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from hwnas.config import Plugin
from hwnas.core.arch import Picks
from hwnas.core.objective import Objective
from hwnas.document import Document
from hwnas.search.learning import Learning
from hwnas.search.meter import SearchCost
from hwnas.search.metric import ACCURACY


class Candidate(BaseModel):
    """An architecture judged by the super-net: predicted latency, and ``quality``, that of the recalibrated network on held-out images.

    It is in 0..1, and ``SearchResult.metric`` names it: accuracy, AP or 1 / (1 + loss).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    picks: Picks
    latency_ms: float
    quality: float
    reward: float
    limits: dict[str, float] = Field({}, description="what search.limits limits, by name")


class SearchResult(Document):
    """What a search found. ``candidates`` are the strategy's proposals, best reward first.

    For comparison, ``random`` are random architectures within the budget, and ``spread`` over the whole space. ``learning`` says whether
    there is anything in it. Version 1 called ``metric`` quality, and a candidate's ``quality`` accuracy, whatever it was.
    """

    SCHEMA: ClassVar[str] = "hwnas.search"
    VERSION: ClassVar[int] = 2

    strategy: str
    metric: str = Field(ACCURACY, description="what the candidates' quality is")
    space_sha256: str
    objective: Objective
    target_ms: float
    tolerance: float
    reachable_ms: tuple[float, float]
    table_sha256: str
    steps: int
    seed: int
    finder: Plugin | None = Field(None, description="what found the candidates, where it was not the strategy itself")
    weights_sha256: str | None = Field(None, description="the super-net file, where an already trained one was used")
    cost: SearchCost | None = Field(None, description="of training, finding and the last ranking; see search/meter.py")
    learning: Learning | None = Field(None, description="whether it learned anything; see search/learning.py")
    candidates: tuple[Candidate, ...] = Field(min_length=1)
    random: tuple[Candidate, ...] = ()
    spread: tuple[Candidate, ...] = ()

    @classmethod
    def migrate(cls, version: int, content: dict[str, Any]) -> dict[str, Any]:
        """Version 1's names."""
        del version
        content["metric"] = content.pop("quality", ACCURACY)
        for group in ("candidates", "random", "spread"):
            if isinstance(content.get(group), list):
                content[group] = [_renamed(candidate) for candidate in content[group]]
        return content


def _renamed(candidate: Any) -> Any:
    """A candidate of version 1; what is none stays as it is, to be refused like any other."""
    if not isinstance(candidate, dict):
        return candidate
    return {("quality" if name == "accuracy" else name): value for name, value in candidate.items()}
