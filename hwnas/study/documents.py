"""The documents that hold the results of studies: ranking architectures, comparing
search methods, and shrinking a space.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from hwnas.core.arch import Picks
from hwnas.document import Document, Record
from hwnas.search.cost_counter import SearchCost

METRICS = (
    "kendall",
    "over_macs",
    "sparse_kendall",
    "kendall_top",
    "spearman",
    "regret",
    "precision",
    "random_reaches",
)
"""The names of the metrics of every score; see study/metrics.py."""


class IntervalEstimate(Record):
    """A metric with its bootstrap interval. ``value`` is None if the metric is undefined;
    ``low`` and ``high`` are None if there is no interval.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


class MeanStd(Record):
    """The mean and sample standard deviation of a metric over super-nets. ``std`` is
    None with fewer than two super-nets.
    """

    mean: float | None
    std: float | None = None


class ScoreResult(Record):
    """How well a score ranks: metrics by name (``METRICS``), for each super-net in the
    order of ``RankStudy.supernets``, and their mean and standard deviation over all
    super-nets.
    """

    name: str
    supernets: tuple[dict[str, IntervalEstimate], ...]
    over_supernets: dict[str, MeanStd]


class Gap(Record):
    """The optimisation gap: the mean accuracy in 0..1 of the scored networks with the
    weights of the super-net, and when trained standalone.
    """

    supernet: float
    standalone: float

    @property
    def difference(self) -> float:
        """By how much standalone training is better."""
        return self.standalone - self.supernet


class SupernetResult(Record):
    """A super-net of the study. ``failed`` maps each architecture without a score to the
    reason; such architectures are left out of the metrics.
    """

    seed: int
    strategy: str
    sha256: str
    scored: int
    failed: dict[str, str] = {}
    gap: Gap | None = Field(None, description="none unless ``accuracy`` is one of the scores")


class TruthInfo(Record):
    """The ground truth and its noise: ``kendall`` is tau between repeated training runs of
    all its networks, ``kendall_top`` of the tenth with the best mean accuracy.
    """

    file: str
    sha256: str
    networks: int
    repeats: int
    columns: tuple[str, ...]
    kendall: float | None = None
    kendall_top: float | None = None


class Point(Record):
    """An architecture with its true accuracy in 0..1 and its scores, each averaged over
    the super-nets that scored it.
    """

    name: str
    truth: float
    scores: dict[str, float]


class RankStudy(Document):
    """How well super-nets rank architectures. ``failed_trainings`` maps each seed without
    a super-net to the reason.
    """

    SCHEMA: ClassVar[str] = "hwnas.rank-study"
    VERSION: ClassVar[int] = 2

    space: str
    space_sha256: str
    truth: TruthInfo
    architectures: int
    threshold: float
    top_k: int
    bootstrap: int
    confidence: float
    base_epochs: float = Field(
        0,
        description=(
            "epochs of training after which the weights are the reference of the angle; 0: the"
            " initial weights"
        ),
    )
    recalibration_images: int
    evaluation_images: int
    supernets: tuple[SupernetResult, ...]
    failed_trainings: dict[str, str] = {}
    scores: tuple[ScoreResult, ...]
    points: tuple[Point, ...]

    @classmethod
    def migrate(cls, version: int, content: dict[str, Any]) -> dict[str, Any]:
        """Replace the names of version 1."""
        for supernet in content["supernets"]:
            gap = supernet.get("gap")
            if gap is not None:
                gap["standalone"] = gap.pop("alone")
        for score in content["scores"]:
            score["over_supernets"] = score.pop("spread")
        return content


class SearchOutcome(Record):
    """The architecture that a method found with a seed, and its true accuracy.

    ``rank`` is its rank among ``CompareStudy.architectures``; 1 is best. Ties count
    against it: the rank is the number of architectures that are at least as good.
    ``regret`` is the distance to the best accuracy in the budget. ``cpu_seconds`` is the
    only measured number here; None if the search was interrupted.
    """

    seed: int
    name: str
    picks: Picks
    macs: int
    accuracy: float
    rank: int
    regret: float
    supernet_quality: float
    cost: SearchCost
    cpu_seconds: float | None = None


class RandomSearch(Record):
    """The exact result of random search with ``trainings`` standalone training runs: the
    mean of its true rank and accuracy, and quantiles of the rank
    (``compare.QUANTILES``).
    """

    trainings: int
    rank: float
    accuracy: float
    ranks: tuple[int, ...]


class MethodResult(Record):
    """A method over its seeds. ``failed`` maps each seed without a result to the reason.

    ``cost`` is the mean cost of its searches in standalone training runs.
    ``p_better_than_one`` is the probability of beating one random architecture by true
    accuracy, ``p_better_than_random`` that of beating random search at equal or higher
    cost (``equal``).
    """

    name: str
    strategy: str
    found: tuple[SearchOutcome, ...]
    failed: dict[str, str] = {}
    rank: float | None = Field(None, description="median over seeds")
    accuracy: float | None = Field(None, description="median over seeds")
    regret: float | None = Field(None, description="median over seeds")
    cost: float | None = None
    equal: RandomSearch | None = None
    p_better_than_one: IntervalEstimate = IntervalEstimate(value=None)
    p_better_than_random: IntervalEstimate = IntervalEstimate(value=None)

    @model_validator(mode="after")
    def _ranked_if_found(self) -> Self:
        if self.found and self.rank is None:
            raise ValueError(f"method {self.name!r} has searches but no rank; create it again")
        return self


class PairwiseResult(Record):
    """One method against another: the probability that the first finds the better
    architecture, and the exact two-sided p-value.
    """

    first: str
    second: str
    beats: IntervalEstimate
    p_value: float

    @model_validator(mode="after")
    def _beats_with_a_probability(self) -> Self:
        if self.beats.value is None:
            raise ValueError(
                f"pair {self.first!r} and {self.second!r} has no probability; create it again"
            )
        return self


class CompareStudy(Document):
    """Whether search methods beat random search and each other; see study/compare.py.

    ``standalone_macs`` is the cost of one standalone training run of the mean architecture
    in the budget.
    """

    SCHEMA: ClassVar[str] = "hwnas.compare-study"
    VERSION: ClassVar[int] = 2

    space: str
    space_sha256: str
    truth: TruthInfo
    budget: str
    target_ms: float | None = Field(
        description="milliseconds; none if the budget is not a latency (see ``budget``)"
    )
    tolerance: float
    architectures: int
    best: str
    best_accuracy: float
    standalone_epochs: float
    standalone_images: int
    standalone_macs: float
    bootstrap: int
    confidence: float
    seeds: tuple[int, ...]
    methods: tuple[MethodResult, ...]
    random: RandomSearch
    pairwise: tuple[PairwiseResult, ...]

    @classmethod
    def migrate(cls, version: int, content: dict[str, Any]) -> dict[str, Any]:
        """Replace the names of version 1."""
        content["pairwise"] = content.pop("duels")
        for method in content["methods"]:
            method["p_better_than_one"] = method.pop("beats_one")
            method["p_better_than_random"] = method.pop("beats_equal")
            for outcome in method["found"]:
                outcome["cost"]["evaluated"] = outcome["cost"].pop("judged")
        return content


class ShrinkStep(Document):
    """One round of shrinking: a super-net of ``size`` architectures was trained, its
    operators scored, and the worst of them dropped.

    ``scores`` are by choice and option. ``children`` is the number of sampled
    architectures that they are averaged over (0 if the metric samples none). ``params``
    is the number of parameters of the super-net (None without a super-net).
    ``refreshed`` says whether W0 was replaced by the trained weights after this drop.
    """

    SCHEMA: ClassVar[str] = "hwnas.shrink-step"

    size: int
    epochs: float
    operation_on: str | None = None
    params: int | None = None
    children: int
    scores: dict[str, dict[str, float]]
    dropped: tuple[tuple[str, str], ...]
    size_after: int
    refreshed: bool = False


class ShrinkPath(Document):
    """How a metric shrank a space, round by round. The resulting space is in
    ``space.json`` in the same folder.
    """

    SCHEMA: ClassVar[str] = "hwnas.shrink-path"

    metric: str
    space: str
    space_sha256: str
    seed: int
    base_epochs: float = Field(
        0,
        description=(
            "epochs of the first training run after which the weights are the reference of its"
            " angle;"
            " 0: the initial weights"
        ),
    )
    steps: tuple[ShrinkStep, ...]
    shrunk_sha256: str


class Remaining(Record):
    """The networks of known accuracy that are left: how many, and their mean, best and
    worst accuracy in 0..1.

    ``best_tenth`` is the part of the best tenth of the whole file that is left.
    """

    networks: int
    mean: float | None = None
    best: float | None = None
    worst: float | None = None
    best_tenth: float | None = None


class ShrinkCurve(Record):
    """The course of a shrinking by the ground truth: before it and after every drop.

    ``operator_kendall`` says how well the scores of each drop ranked the operators: tau
    with the mean true accuracy of the remaining networks that contain each operator.
    """

    name: str
    remaining: tuple[Remaining, ...]
    operator_kendall: tuple[float | None, ...] = ()


class Chance(Record):
    """Many random shrinkings: by round, the mean and the 5 % and 95 % quantiles of the
    mean true accuracy and of the part of the best tenth that is left.
    """

    repeats: int
    mean: tuple[tuple[float, float, float], ...]
    best_tenth: tuple[tuple[float, float, float], ...]


class ShrinkStudy(Document):
    """A space shrunk by several metrics and, if accuracies are known, the networks that
    each metric leaves.

    ``oracle`` drops the operators of lowest mean true accuracy by the same rule: the
    result of a perfect score of operators.
    """

    SCHEMA: ClassVar[str] = "hwnas.shrink-study"

    space: str
    space_sha256: str
    seed: int
    paths: tuple[ShrinkPath, ...]
    truth: TruthInfo | None = None
    curves: tuple[ShrinkCurve, ...] = ()
    oracle: ShrinkCurve | None = None
    chance: Chance | None = None
