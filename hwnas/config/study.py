"""The tables ``study`` and ``shrink``: what is asked of super-nets and methods, and how
a space is shrunk.
"""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from hwnas.config.base import Plugin, Section
from hwnas.config.search import OperationOn

ScoreName = Literal[
    "accuracy", "loss", "unrecalibrated", "angle", "macs", "params", "grad_norm", "snip", "synflow"
]
"""What ``hwnas study rank`` scores architectures by; see study/scores.py."""


FIXED_BY_THE_STUDY = (
    *("objective", "table", "target_ms", "budget", "target_range", "tolerance", "limits"),
    *("allow_uncalibrated", "weights", "backbone"),
)
"""Keys of ``search`` that all methods of a comparison share, or that would give one of
them a start.
"""


class MethodConfig(Section):
    """A method of ``hwnas study compare``: a strategy, and what it changes in ``search``."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="what it is called; default: its strategy's name",
    )
    strategy: Plugin
    search: dict[str, Any] = Field(
        {},
        description=(
            "keys of [search] that are others for this method: epochs, finder, supernet, ..."
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        value = {"strategy": value} if isinstance(value, str) else value
        if isinstance(value, dict) and "name" not in value and "strategy" in value:
            strategy = value["strategy"]
            name = (
                strategy.get("name")
                if isinstance(strategy, dict)
                else getattr(strategy, "name", strategy)
            )
            return {**value, "name": name}
        return value

    @model_validator(mode="after")
    def _same_task(self) -> Self:
        fixed = [key for key in self.search if key in (*FIXED_BY_THE_STUDY, "strategy")]
        if fixed:
            raise ValueError(
                f"method {self.name!r} sets search.{fixed[0]}, which all methods of a study share;"
                " set it in [search]"
            )
        return self


class CompareConfig(Section):
    """``hwnas study compare``: which methods, under which budget, and what training
    alone costs. The rest is as in ``search``.
    """

    methods: tuple[MethodConfig, ...] = Field(
        (), description="names of strategies, or tables of strategy, name and search"
    )
    max_macs: int | None = Field(
        None,
        gt=0,
        description=(
            "budget in multiply-accumulates, where search.table is not set: architectures of at"
            " most so many, and of at least (1 - tolerance) / (1 + tolerance) of them, which is"
            " search.tolerance on either side of the target"
        ),
    )
    standalone_epochs: float = Field(
        50, gt=0, description="of each training that the truth is from; NAS-Bench-Macro: 50 ..."
    )
    standalone_images: int = Field(50_000, ge=1, description="... of CIFAR-10's 50,000 images")

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        names = [method.name for method in self.methods]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(
                f"study.compare.methods has {twice[0]!r} twice; give one of them another name"
            )
        return self


class StudyConfig(Section):
    """``hwnas study rank`` and ``hwnas study compare``: do super-nets rank
    architectures right, and do methods beat random search?

    The super-nets and their images are those of ``search``.
    """

    truth: str | None = Field(
        None,
        description=(
            "file of architectures with stand-alone accuracies (.csv or .json); see study/truth.py"
        ),
    )
    accuracies: tuple[str, ...] = Field(
        (), description="its columns of repeated trainings; default: all that look like accuracies"
    )
    architectures: int = Field(
        300,
        ge=2,
        description=(
            "random ones of the file that are scored; a larger number keeps those of a smaller"
        ),
    )
    seeds: tuple[int, ...] = Field(
        (), description="one super-net is trained for each; default: that of the experiment"
    )
    supernets: tuple[str, ...] = Field(
        (), description="instead: search folders of earlier runs, whose trained super-nets are used"
    )
    scores: tuple[ScoreName, ...] = Field(
        ("accuracy", "loss", "unrecalibrated", "angle", "macs", "params"), min_length=1
    )
    combinations: tuple[tuple[ScoreName, ...], ...] = Field(
        (), description="scores whose ranks are added up, such as accuracy and angle"
    )
    threshold: float = Field(
        0.001,
        gt=0,
        lt=1,
        description="bins of the true accuracy in the sparse Kendall tau; 0.001: 0.1 %",
    )
    base_epochs: float = Field(
        0,
        ge=0,
        description=(
            "the angle is from the weights after so many epochs; 0: from the initialisation."
            " NAS-Bench-201's: 391 steps"
        ),
    )
    top_k: int = Field(10, ge=1, description="of regret, P@k and the comparison with random search")
    bootstrap: int = Field(
        1000, ge=10, description="resamples of the architectures, for the intervals"
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals")
    compare: CompareConfig = CompareConfig()
    processes: int = Field(
        1,
        ge=1,
        description="trainings at a time on this computer; one: in the command's own process",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description=(
            "of each training; they decide the last bits. Default: one, or all where a study has a"
            " single training"
        ),
    )
    ray_address: str | None = Field(
        None,
        description="HOST:PORT of a Ray cluster that trains instead, or 'auto' on a machine of it",
    )
    ray_gpus: float = Field(0, ge=0, description="GPUs that a training takes of the cluster")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.seeds and self.supernets:
            raise ValueError(
                "study.seeds trains super-nets and study.supernets takes trained ones; remove one"
                " of them"
            )
        twice = [seed for seed in self.seeds if self.seeds.count(seed) > 1]
        if twice:
            raise ValueError(f"study.seeds has {twice[0]} twice; give each seed once")
        if self.top_k >= self.architectures:
            raise ValueError(
                f"study.top_k = {self.top_k} are not fewer than study.architectures ="
                f" {self.architectures}; lower it"
            )
        for each in self.combinations:
            missing = [name for name in each if name not in self.scores]
            if missing or len(each) < 2:
                raise ValueError(
                    f"study.combinations has {list(each)}; give two or more of study.scores:"
                    f" {', '.join(self.scores)}"
                )
        return self


class ShrinkConfig(Section):
    """``hwnas study shrink``: the operators that a metric finds worst leave the space,
    stage by stage. See search/shrinking.py.

    The defaults are those of angle-based shrinking (arXiv 2004.13431) on SPOS's space,
    where they are not said to be ours. The super-net, its images and its optimiser are
    those of ``search``.
    """

    metrics: tuple[str, ...] = Field(
        ("angle",),
        min_length=1,
        description="what finds operators bad: angle, accuracy, magnitude, random",
    )
    samples: int = Field(
        1000,
        ge=1,
        description=(
            "sampled architectures that contain each operator, at least, where there are as many"
        ),
    )
    evaluated_samples: int | None = Field(
        None,
        ge=1,
        description=(
            "the same for metrics that evaluate each architecture on images, such as accuracy"
            " (ours); default: samples"
        ),
    )
    tries: int = Field(100, ge=1, description="at most so many times as many are drawn")
    max_macs: float | None = Field(
        None, gt=0, description="only architectures up to these multiply-accumulates are sampled"
    )
    sampling: Literal["architectures", "depths"] = Field(
        "depths",
        description=(
            "architectures: uniform; depths: the number of skipped slots is uniform, then the rest"
            " (SPOS)"
        ),
    )
    drop: Literal["lowest", "each"] = Field(
        "lowest",
        description="lowest: of the whole space; each: the lowest of every choice (FairNAS)",
    )
    dropped: int = Field(
        7, ge=1, description="operators that leave at each stage, with drop = 'lowest'"
    )
    keep: int = Field(1, ge=1, description="options that every choice keeps")
    until: int = Field(1_000_000, ge=1, description="stop when the space is no larger")
    first_epochs: float = Field(
        100, gt=0, description="of training before the first drop, which all metrics share"
    )
    epochs: float = Field(5, gt=0, description="of training before each further drop")
    base_epochs: float = Field(
        0,
        ge=0,
        description=(
            "W0 is of so many epochs into the first training (AngleNAS on DARTS's cells: 5)"
        ),
    )
    refresh_after: int | None = Field(
        50,
        ge=0,
        description="W0 becomes the present weights, once, when more operators are dropped",
    )
    operation_on: tuple[OperationOn, ...] = Field(
        (),
        description=(
            "search.supernet.operation_on of each stage, the last for all later ones: fewer"
            " operators, less sharing (PWSNAS)"
        ),
    )
    alpha_lr: float = Field(3e-4, gt=0, description="magnitude: Adam's rate (DARTS)")
    alpha_every: int = Field(
        1, ge=1, description="magnitude: steps of the weights for each of alpha (ours)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.base_epochs >= self.first_epochs:
            raise ValueError(
                f"shrink.base_epochs = {self.base_epochs:g} is no part of first_epochs ="
                f" {self.first_epochs:g}; lower it"
            )
        twice = [name for name in self.metrics if self.metrics.count(name) > 1]
        if twice:
            raise ValueError(f"shrink.metrics has {twice[0]!r} twice; give each metric once")
        levels = [get_args(OperationOn).index(level) for level in self.operation_on]
        if levels != sorted(levels):
            raise ValueError(
                f"shrink.operation_on = {list(self.operation_on)} shares more again; only go from"
                " node to edge to op"
            )
        return self
