"""The tables ``study`` and ``shrink``: how super-nets and search methods are studied,
and how a space is shrunk.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from hwnas.config.base import Count, Epochs, Images, Plugin, Processes, Section
from hwnas.config.search import OperationOn

ScoreName = Literal[
    "accuracy", "loss", "unrecalibrated", "angle", "macs", "params", "grad_norm", "snip", "synflow"
]
"""The scores of architectures in ``hwnas study rank``; see study/scores.py."""


FIXED_BY_THE_STUDY = (
    "objective",
    "table",
    "target_ms",
    "budget",
    "target_range",
    "tolerance",
    "limits",
    "allow_uncalibrated",
    "weights",
    "backbone",
)
"""Keys of ``search`` that a method of a comparison cannot set: all methods share them,
or they would give one method a head start.
"""


class MethodConfig(Section):
    """A method of ``hwnas study compare``: a strategy, and the keys of ``search`` that
    it changes.
    """

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the method in folders and results; default: its strategy's",
    )
    strategy: Plugin = Field(
        description="search strategy: a name, or a table of its name and its own options"
    )
    search: dict[str, Any] = Field(
        {},
        description=(
            "keys of [search] with another value for this method: epochs, finder, supernet, ..."
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"strategy": value}
        if isinstance(value, dict) and "name" not in value and "strategy" in value:
            strategy = value["strategy"]
            # TOML gives a name or a table, code may give a Plugin.
            name = getattr(strategy, "name", strategy)
            if isinstance(strategy, dict):
                name = strategy.get("name")
            return {**value, "name": name}
        return value

    @model_validator(mode="after")
    def _check_search_keys(self) -> Self:
        fixed = [key for key in self.search if key in (*FIXED_BY_THE_STUDY, "strategy")]
        if fixed:
            raise ValueError(
                f"method {self.name!r} sets search.{fixed[0]}, which all methods of a study share;"
                " set it in [search]"
            )
        return self


class CompareConfig(Section):
    """``hwnas study compare``: the methods, their budget, and the cost of standalone
    training. Everything else is taken from ``search``.
    """

    methods: tuple[MethodConfig, ...] = Field(
        (),
        max_length=1000,
        description="names of strategies, or tables of strategy, name and search",
    )
    max_macs: int | None = Field(
        None,
        gt=0,
        le=10**18,
        description=(
            "budget in multiply-accumulates if search.table is not set: architectures have at most"
            " this many, and at least (1 - tolerance) / (1 + tolerance) times as many, which is"
            " search.tolerance on either side of the target"
        ),
    )
    standalone_epochs: Epochs = Field(
        50,
        description=(
            "epochs of each standalone training run that the truth comes from, which determine its"
            " cost; default: NAS-Bench-Macro's"
        ),
    )
    standalone_images: Images = Field(
        50_000,
        description="images per epoch of these training runs; default: CIFAR-10's training images",
    )

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [method.name for method in self.methods]
        # names are the names of the methods' folders
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(
                f"study.compare.methods has {twice[0]!r} twice; give one of them another name"
            )
        return self


class StudyConfig(Section):
    """``hwnas study rank`` measures how well super-nets rank architectures,
    ``hwnas study compare`` whether search methods beat random search.

    Super-nets are trained, and architectures evaluated, as ``search`` says.
    """

    truth: str | None = Field(
        None,
        description=(
            "file of architectures with their standalone accuracies (.csv or .json); see"
            " study/truth.py"
        ),
    )
    accuracies: tuple[str, ...] = Field(
        (),
        max_length=1000,
        description=(
            "columns (or JSON keys) of that file with the accuracies of repeated training runs;"
            " default: all whose name looks like an accuracy"
        ),
    )
    architectures: int = Field(
        300,
        ge=2,
        le=10_000_000,
        description=(
            "number of random architectures of that file to score; a larger sample contains the"
            " smaller ones"
        ),
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(
        (),
        max_length=1000,
        description=(
            "seeds: rank trains a super-net with each (default: the seed of the experiment), and"
            " compare searches with each method and each of them"
        ),
    )
    supernets: tuple[str, ...] = Field(
        (),
        max_length=1000,
        description=(
            "search folders of earlier runs, whose trained super-nets are used instead of training"
            " new ones"
        ),
    )
    scores: tuple[ScoreName, ...] = Field(
        ("accuracy", "loss", "unrecalibrated", "angle", "macs", "params"),
        min_length=1,
        max_length=100,
        description="scores to compute; see study/scores.py",
    )
    combinations: tuple[tuple[ScoreName, ...], ...] = Field(
        (),
        max_length=1000,
        description="sets of scores whose ranks are added up, such as accuracy and angle",
    )
    threshold: float = Field(
        0.001,
        gt=0,
        lt=1,
        description=(
            "width of the bins of true accuracy (0 to 1) in the sparse Kendall tau; 0.001 is 0.1 %"
        ),
    )
    base_epochs: float = Field(
        0,
        ge=0,
        le=1_000_000,
        description=(
            "the angle is measured from the weights after this many epochs; 0: from the initial"
            " weights. AngleNAS on NAS-Bench-201: 391 steps"
        ),
    )
    top_k: int = Field(
        10,
        ge=1,
        le=10_000_000,
        description="k of regret, P@k and the comparison with random search",
    )
    bootstrap: int = Field(
        1000,
        ge=10,
        le=1_000_000,
        description="bootstrap resamples (of architectures or seeds) for confidence intervals",
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="level of the confidence intervals")
    compare: CompareConfig = CompareConfig()
    processes: Processes = Field(
        1,
        description="concurrent training runs on this computer; 1: in the process of the command",
    )
    threads: Processes | None = Field(
        None,
        description=(
            "threads of each training run, which affect the last bits of its results; default: 1,"
            " or torch's default if a study has a single run"
        ),
    )
    ray_address: str | None = Field(
        None,
        description=(
            "HOST:PORT of a Ray cluster to train on, or 'auto' on a machine of the cluster;"
            " default: this computer"
        ),
    )
    ray_gpus: float = Field(
        0, ge=0, le=1024, description="GPUs of the cluster for each training run"
    )

    @model_validator(mode="after")
    def _check_study(self) -> Self:
        if self.seeds and self.supernets:
            raise ValueError(
                "study.seeds trains super-nets and study.supernets uses trained ones; remove one of"
                " them"
            )
        twice = [seed for seed in self.seeds if self.seeds.count(seed) > 1]
        if twice:
            raise ValueError(f"study.seeds has {twice[0]} twice; give each seed once")
        # the best k of k are all of them, whatever a score says
        if self.top_k >= self.architectures:
            raise ValueError(
                f"study.top_k = {self.top_k} is not below study.architectures ="
                f" {self.architectures}; lower it"
            )
        for combination in self.combinations:
            missing = [name for name in combination if name not in self.scores]
            if missing or len(combination) < 2:
                raise ValueError(
                    f"study.combinations has {list(combination)}; give two or more of study.scores:"
                    f" {', '.join(self.scores)}"
                )
        return self


class ShrinkConfig(Section):
    """``hwnas study shrink``: drop the worst operators of a space, by a metric, in
    rounds. See search/shrinking.py.

    The defaults are those of angle-based shrinking (arXiv 2004.13431) on the space of
    SPOS, except for those marked as ours. The super-net, its images and its optimiser
    are configured in ``search``.
    """

    metrics: tuple[str, ...] = Field(
        ("angle",),
        min_length=1,
        max_length=100,
        description="metrics that score operators: angle, accuracy, magnitude, random",
    )
    samples: Count = Field(
        1000,
        description="minimum number of sampled architectures per operator, if that many exist",
    )
    evaluated_samples: Count | None = Field(
        None,
        description=(
            "the same number for metrics that evaluate architectures on images, such as accuracy"
            " (ours); default: samples"
        ),
    )
    tries: Count = Field(100, description="draw at most `tries` x `samples` architectures")
    max_macs: float | None = Field(
        None,
        gt=0,
        le=1e18,
        description="maximum multiply-accumulates of a sampled architecture",
    )
    sampling: Literal["architectures", "depths"] = Field(
        "depths",
        description=(
            "architectures: uniform over architectures; depths: first the number of skipped slots,"
            " uniformly, then the rest (SPOS)"
        ),
    )
    drop: Literal["lowest", "each"] = Field(
        "lowest",
        description=(
            "operators to drop in a round: lowest: those with the lowest scores of the whole space;"
            " each: the lowest of every choice (FairNAS)"
        ),
    )
    dropped: Count = Field(
        7, description="number of operators dropped in each round with drop = 'lowest'"
    )
    keep: Count = Field(1, description="minimum number of options left in every choice")
    until: int = Field(
        1_000_000,
        ge=1,
        le=10**18,
        description="stop when the space has at most this many architectures",
    )
    first_epochs: Epochs = Field(
        100,
        description="epochs of training before the first drop, which all metrics share",
    )
    epochs: Epochs = Field(5, description="epochs of training before each further drop")
    base_epochs: float = Field(
        0,
        ge=0,
        le=1_000_000,
        description=(
            "angle: epochs of the first training after which the weights become W0, which angles"
            " are measured from; 0: the initial weights (AngleNAS on DARTS's cells: 5)"
        ),
    )
    refresh_after: int | None = Field(
        50,
        ge=0,
        le=10_000_000,
        description=(
            "angle: the current weights replace W0, once, when more than this many operators have"
            " been dropped"
        ),
    )
    operation_on: tuple[OperationOn, ...] = Field(
        (),
        max_length=1000,
        description=(
            "search.supernet.operation_on of each round; later rounds use the last one. Fewer"
            " operators allow less sharing (PWSNAS)"
        ),
    )
    alpha_lr: float = Field(
        3e-4, gt=0, le=1e6, description="magnitude: learning rate of Adam for alpha (DARTS)"
    )
    alpha_every: int = Field(
        1,
        ge=1,
        le=1_000_000,
        description="magnitude: training steps of the weights per step of alpha (ours)",
    )

    @model_validator(mode="after")
    def _check_rounds(self) -> Self:
        # the angle compares the weights after these epochs with those at the first drop
        if self.base_epochs >= self.first_epochs:
            raise ValueError(
                f"shrink.base_epochs = {self.base_epochs:g} is not below first_epochs ="
                f" {self.first_epochs:g}; lower it"
            )
        twice = [name for name in self.metrics if self.metrics.count(name) > 1]
        if twice:
            raise ValueError(f"shrink.metrics has {twice[0]!r} twice; give each metric once")
        # weights that were shared can be copied to several places, but not merged again
        levels = [get_args(OperationOn).index(level) for level in self.operation_on]
        if levels != sorted(levels):
            raise ValueError(
                f"shrink.operation_on = {list(self.operation_on)} shares more in a later round;"
                " only go from node to edge to op"
            )
        return self
