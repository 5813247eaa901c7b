"""The results of studies as documents: of ranking, of comparing methods, and of
shrinking a space.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

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
"""The numbers of every score; see study/metrics.py."""


class Estimate(Record):
    """A metric on the scored architectures, and its interval over architectures. None
    where it is undefined.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


class Spread(Record):
    """A metric over super-nets: mean and sample standard deviation (none for fewer than
    two super-nets).
    """

    mean: float | None
    std: float | None = None


class ScoreResult(Record):
    """How a score ranks: metrics by name (``METRICS``), for each super-net in the order
    of ``RankStudy.supernets``, and over all.
    """

    name: str
    supernets: tuple[dict[str, Estimate], ...]
    spread: dict[str, Spread]


class Gap(Record):
    """The optimisation gap: mean accuracy of the scored networks with the super-net's
    weights and trained alone, in 0..1.
    """

    supernet: float
    alone: float

    @property
    def difference(self) -> float:
        """How much better trained alone."""
        return self.alone - self.supernet


class SupernetResult(Record):
    """A super-net of the study. ``failed`` says of an architecture why it has no score;
    it takes no part in the metrics.
    """

    seed: int
    strategy: str
    sha256: str
    scored: int
    failed: dict[str, str] = {}
    gap: Gap | None = Field(
        None, description="where the recalibrated accuracy was among the scores"
    )


class TruthInfo(Record):
    """The ground truth, and its noise: tau between repeated trainings of all its
    networks, and of the tenth that is best on average.
    """

    file: str
    sha256: str
    networks: int
    repeats: int
    columns: tuple[str, ...]
    kendall: float | None = None
    kendall_top: float | None = None


class Point(Record):
    """An architecture with its true accuracy and its scores, the mean over the
    super-nets that scored it.
    """

    name: str
    truth: float
    scores: dict[str, float]


class RankStudy(Document):
    """Does a super-net rank architectures right? ``failed_trainings`` says of a seed
    why it has no super-net.
    """

    SCHEMA: ClassVar[str] = "hwnas.rank-study"

    space: str
    space_sha256: str
    truth: TruthInfo
    architectures: int
    threshold: float
    top_k: int
    bootstrap: int
    confidence: float
    base_epochs: float = Field(
        0, description="into the training, from where on the angle is; 0: from the initialisation"
    )
    recalibration_images: int
    evaluation_images: int
    supernets: tuple[SupernetResult, ...]
    failed_trainings: dict[str, str] = {}
    scores: tuple[ScoreResult, ...]
    points: tuple[Point, ...]


class SearchOutcome(Record):
    """What a method proposed with a seed, and what it is worth: ``rank`` of
    ``CompareStudy.architectures``, 1 is best.

    Ties count against it: the rank is the number of architectures that are at least as
    good. ``regret`` is to the best in the budget. ``cpu_seconds`` is the one number
    here that is measured; None where the search was interrupted.
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
    """Random search by ``trainings`` stand-alone trainings, exactly: the mean, and
    quantiles (``QUANTILES``) of its true rank.
    """

    trainings: int
    rank: float
    accuracy: float
    ranks: tuple[int, ...]


class MethodResult(Record):
    """A method over its seeds. ``failed`` says of a seed why it has no result.

    ``cost`` is the mean of its searches in stand-alone trainings. ``p_better_than_one`` and
    ``p_better_than_random`` are the probabilities to beat a random architecture, and random
    search of at least equal cost (``equal``), by true accuracy.
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
    p_better_than_one: Estimate = Estimate(value=None)
    p_better_than_random: Estimate = Estimate(value=None)


class PairwiseResult(Record):
    """One method against another: the probability that it finds the better
    architecture, and the exact two-sided p-value.
    """

    first: str
    second: str
    beats: Estimate
    p_value: float


class CompareStudy(Document):
    """Do search methods beat random search, and each other? See study/compare.py.

    ``standalone_macs`` is the cost of one stand-alone training of the mean architecture
    in the budget.
    """

    SCHEMA: ClassVar[str] = "hwnas.compare-study"
    VERSION: ClassVar[int] = 2

    space: str
    space_sha256: str
    truth: TruthInfo
    budget: str
    target_ms: float | None = Field(
        description="none where the budget is of something else, as ``budget`` says"
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
        """The names of version 1."""
        content["pairwise"] = content.pop("duels")
        for method in content["methods"]:
            method["p_better_than_one"] = method.pop("beats_one")
            method["p_better_than_random"] = method.pop("beats_equal")
            for outcome in method["found"]:
                outcome["cost"]["evaluated"] = outcome["cost"].pop("judged")
        return content


class ShrinkStep(Document):
    """One stage of shrinking: a super-net of ``size`` architectures was trained, its
    operators scored, and the worst dropped.

    ``scores`` are by choice and option, ``children`` the sampled architectures they are
    means over (0: none were needed), ``params`` the super-net's parameters (none: there
    was no super-net). ``refreshed``: W0 became the present weights after this drop.
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
    """How a metric has shrunk a space, stage by stage; ``space.json`` beside it is what is left."""

    SCHEMA: ClassVar[str] = "hwnas.shrink-path"

    metric: str
    space: str
    space_sha256: str
    seed: int
    base_epochs: float = Field(
        0,
        description=(
            "into the first training, from where on its angle is; 0: from the initialisation"
        ),
    )
    steps: tuple[ShrinkStep, ...]
    shrunk_sha256: str


class Remaining(Record):
    """What is left of the networks whose accuracy is known: how many, their mean and
    best accuracy in 0..1, and the worst.

    ``best_tenth`` is the part of the whole file's best tenth that is still there.
    """

    networks: int
    mean: float | None = None
    best: float | None = None
    worst: float | None = None
    best_tenth: float | None = None


class ShrinkCurve(Record):
    """The course of a shrinking by the ground truth: before, and after every drop.

    ``operator_kendall`` says of every drop how well the scores ranked the operators:
    tau with the mean true accuracy of the networks, of those left, that contain each.
    """

    name: str
    remaining: tuple[Remaining, ...]
    operator_kendall: tuple[float | None, ...] = ()


class Chance(Record):
    """Random shrinking, many times: mean and the 5 and 95 % quantiles of the mean true
    accuracy and of the best tenth's part, by stage.
    """

    repeats: int
    mean: tuple[tuple[float, float, float], ...]
    best_tenth: tuple[tuple[float, float, float], ...]


class ShrinkStudy(Document):
    """A space shrunk by several metrics, and, where accuracies are known, what each has left.

    ``oracle`` drops the operators of lowest mean true accuracy by the same rule, drop
    by drop: what a perfect score of operators does.
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
