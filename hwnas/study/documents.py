"""The result of a ranking study as a document."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from hwnas.document import Document


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Estimate(_Part):
    """A metric on the scored architectures, and its interval over architectures. None where it is undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None


class Spread(_Part):
    """A metric over super-nets: mean and sample standard deviation (none for fewer than two super-nets)."""

    mean: float | None
    std: float | None = None


class ScoreResult(_Part):
    """How a score ranks: metrics by name (``METRICS``), for each super-net in the order of ``RankStudy.supernets``, and over all."""

    name: str
    supernets: tuple[dict[str, Estimate], ...]
    spread: dict[str, Spread]


class Gap(_Part):
    """The optimisation gap: mean accuracy of the scored networks with the super-net's weights and trained alone, in 0..1."""

    supernet: float
    alone: float

    @property
    def difference(self) -> float:
        """How much better trained alone."""
        return self.alone - self.supernet


class SupernetResult(_Part):
    """A super-net of the study. ``failed`` says of an architecture why it has no score; it takes no part in the metrics."""

    seed: int
    strategy: str
    sha256: str
    scored: int
    failed: dict[str, str] = {}
    gap: Gap | None = Field(None, description="where the recalibrated accuracy was among the scores")


class TruthInfo(_Part):
    """The ground truth, and its noise: tau between repeated trainings of all its networks, and of the tenth that is best on average."""

    file: str
    sha256: str
    networks: int
    repeats: int
    columns: tuple[str, ...]
    kendall: float | None = None
    kendall_top: float | None = None


class Point(_Part):
    """An architecture with its true accuracy and its scores, the mean over the super-nets that scored it."""

    name: str
    truth: float
    scores: dict[str, float]


class RankStudy(Document):
    """Does a super-net rank architectures right? ``failed_trainings`` says of a seed why it has no super-net."""

    SCHEMA: ClassVar[str] = "hwnas.rank-study"

    space: str
    space_sha256: str
    truth: TruthInfo
    architectures: int
    threshold: float
    top_k: int
    bootstrap: int
    confidence: float
    recalibration_images: int
    evaluation_images: int
    supernets: tuple[SupernetResult, ...]
    failed_trainings: dict[str, str] = {}
    scores: tuple[ScoreResult, ...]
    points: tuple[Point, ...]
