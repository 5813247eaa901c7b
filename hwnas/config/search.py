"""The table ``search``: how a super-net is trained, and the space searched."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from hwnas.config.base import Plugin, Section, with_usual
from hwnas.core.limits import AnyBudget, Budget, LatencyLimit, Limit
from hwnas.core.objective import AbsoluteObjective, Objective

ADAMW = {"lr": 0.024, "weight_decay": 0.02, "warmup": 0.1}
"""Defaults where ``adamw`` is named: those of our recipes. TuNAS's rate is for RMSprop
with an eps of 1.
"""


class OptimizerConfig(Section):
    """Optimiser of network weights, by timm's name (its ``sgd`` is Nesterov's; plain:
    ``momentum``).

    The defaults are TuNAS's: rmsproptf, rate 0.165 per 256 images, momentum and decay
    0.9, eps 1. Of ``adamw`` they are rate 0.024, decay 0.02 and warm-up 0.1. In short
    trainings neither was ahead on both a slice of CIFAR-10 and raccoon.
    """

    name: str = "rmsproptf"
    lr: float = Field(0.165, gt=0, description="per 256 images; scaled linearly with the batch")
    momentum: float = 0.9
    weight_decay: float = Field(
        4e-5, ge=0, description="gradient term wd * w; TuNAS writes the same as l2(wd / 2)"
    )
    options: dict[str, float] | None = Field(
        None, description="further arguments; default for rmsproptf: alpha 0.9, eps 1 (TuNAS)"
    )
    warmup: float = Field(
        0.025,
        ge=0,
        lt=1,
        description="part of the steps with linearly rising rate; then cosine to 0",
    )
    clip_norm: float | None = Field(None, description="clip the gradient's global norm")
    inactive_weights: Literal["frozen", "decay"] = Field(
        "frozen",
        description=(
            "what happens to weights that a step does not use: they stay as they are (SPOS), or"
            " momentum and weight decay go on moving them once they have been used"
            " (NAS-Bench-201's code)"
        ),
    )

    @model_validator(mode="wrap")
    @classmethod
    def _usual(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """The defaults of the optimiser that is named. They do not count as given."""
        usual = ADAMW if isinstance(given, dict) and given.get("name") == "adamw" else {}
        return with_usual(given, usual, handler)


OperationOn = Literal["node", "edge", "op"]
"""What a slot's weights belong to, the most shared first."""


class SupernetConfig(Section):
    """How the super-net shares its weights. The defaults are TuNAS's.

    The 14 heuristics of Yu, Ranftl, Salzmann, "How to Train Your Super-Net" (arXiv
    2003.04276), by name. Mapping of weights: ``channels`` (dynamic channelling),
    ``kernels`` (OFA kernel), ``wsbn``, ``dropout`` (global), ``path_dropout``,
    ``operation_on``; low fidelity: ``proxy_depth`` (layers), ``proxy_width``
    (channels), ``search.data_portion`` and ``search.batch_size``, and, ours,
    ``proxy_resolution`` (pixels); protocol: ``bn_affine`` and ``bn_track``,
    ``search.optimizer.lr`` with ``search.epochs``, ``search.optimizer.weight_decay``,
    and the sampling of paths (``sampling`` of the strategy spos). Options of cells
    share no weights, so of the mapping they have ``dropout``.
    """

    sharing: Literal["auto", "collapsed", "separate"] = Field(
        "auto",
        description=(
            "collapsed: options share expansion and projection (TuNAS); separate: own weights;"
            " auto: as in the method's paper"
        ),
    )
    kernels: Literal["auto", "own", "ofa", "ofa_transform"] = Field(
        "auto",
        description=(
            "own: weights per kernel size; ofa: the centre of the largest; ofa_transform: times a"
            " learned matrix; auto: as above"
        ),
    )
    channels: Literal["first", "chunk", "random", "interpolation"] = Field(
        "first",
        description=(
            "which channels a narrower layer uses: the first; random ones in a row; any random"
            " ones; averages"
        ),
    )
    operation_on: OperationOn = Field(
        "node",
        description=(
            "edge: own weights per slot that the input comes from; op: per slot and option that it"
            " comes from"
        ),
    )
    wsbn: bool = Field(
        False,
        description=(
            "own BN per slot that the input comes from (with operation_on = 'op', and per option)"
        ),
    )
    initialisation: Literal["auto", "he", "torch"] = Field(
        "auto",
        description=(
            "of blocks; he: normal by fan-in (TuNAS); torch: PyTorch's, a sixth of its variance;"
            " auto: torch for cells, else he"
        ),
    )
    bn_affine: bool = Field(True, description="BN with scale and shift")
    bn_track: bool = Field(False, description="BN keeps running statistics, and scores with them")
    dropout: float = Field(0.0, ge=0, lt=1, description="before the classifier")
    path_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="of residual branches, at the last layer at the end; rises with both (NAO)",
    )
    proxy_depth: int | None = Field(
        None, ge=1, description="train with only so many slots, or cells, per stage; default all"
    )
    proxy_width: float = Field(1.0, gt=0, le=1, description="train with widths scaled down")
    proxy_resolution: int | None = Field(
        None, ge=8, description="train on images scaled down to so many pixels; default none (ours)"
    )
    full_resolution: float = Field(
        0.0,
        ge=0,
        le=1,
        description="proxy_resolution: this last part of the steps is on images as they are",
    )
    remat: bool = Field(
        True,
        description=(
            "recompute a mixture's options in the backward pass; single paths never need it"
        ),
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.bn_track and self.channels in ("random", "interpolation"):
            raise ValueError(
                "bn_track needs channels in a row; set channels = 'first' or 'chunk', not"
                f" {self.channels!r}"
            )
        if self.full_resolution and self.proxy_resolution is None:
            raise ValueError(
                f"full_resolution = {self.full_resolution:g} says when a proxy_resolution ends; set"
                " proxy_resolution, too"
            )
        return self


class SearchConfig(Section):
    """How the space is searched."""

    strategy: Plugin = Plugin(name="tunas")
    objective: Objective = Field(AbsoluteObjective(), discriminator="name")
    target_ms: float | None = Field(
        None,
        gt=0,
        description="latency budget in milliseconds: short for a budget of kind 'latency'",
    )
    budget: Budget | None = Field(
        None,
        description=(
            "the budget in any unit: latency, macs, params or size_bytes, with the keys of"
            " search.limits; its number is the target"
        ),
    )
    target_range: float | None = Field(
        None,
        ge=0,
        le=1,
        description=(
            "where the budget has no number: its place between the space's fastest (or smallest, 0)"
            " and slowest (1) architecture"
        ),
    )
    tolerance: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="the searched network's predicted cost is within this part of the target",
    )
    table: str | None = Field(None, description="a latency table to use instead of profiling")
    allow_uncalibrated: bool = False
    epochs: float = Field(20, gt=0)
    batch_size: int = Field(64, ge=2)
    optimizer: OptimizerConfig = OptimizerConfig()
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    supernet: SupernetConfig = SupernetConfig()
    data_portion: float = Field(
        1.0, gt=0, le=1, description="part of the training images that the super-net sees"
    )
    weights: str | None = Field(
        None,
        description=(
            "the search folder of an earlier run: its trained super-net is used as it is, and only"
            " the finder runs"
        ),
    )
    backbone: str | None = Field(
        None,
        description=(
            "detection: the search folder of a classification run, whose super-net's backbone"
            " weights this one begins with"
        ),
    )
    quality: Literal["metric", "loss"] = Field(
        "metric",
        description=(
            "what architectures are judged by on held-out images, and classifiers rewarded for:"
            " accuracy or AP; or 1 / (1 + loss), for few images or epochs"
        ),
    )
    finder: Plugin | None = Field(
        None, description="how architectures are found; default: the strategy's own way"
    )
    limits: tuple[Limit, ...] = Field(
        (),
        description=(
            "further constraints, one [[search.limits]] each: other tables, macs, params,"
            " size_bytes, activation_bytes"
        ),
    )
    candidates: int = Field(
        8,
        ge=1,
        description=(
            "proposals of the strategy that are ranked by recalibrated held-out accuracy (or AP)"
        ),
    )
    recalibration_images: int = Field(
        1024,
        ge=0,
        description=(
            "training images that re-estimate BN statistics before any ranking; 0: tracked ones"
            " (supernet.bn_track)"
        ),
    )
    evaluation_images: int = Field(
        1000,
        ge=1,
        description="held-out images that a finder judges on; the last ranking is on all of them",
    )
    random_samples: int | None = Field(
        None,
        ge=0,
        description=(
            "random architectures scored for comparison, within the budget and anywhere each;"
            " default: up to 8, as many as keep the last ranking and this within a fifth of the"
            " search's cost, at least 4"
        ),
    )

    @property
    def main_budget(self) -> AnyBudget:
        """``budget``, or the one of latency that ``target_ms`` is short for."""
        return (
            self.budget
            if self.budget is not None
            else LatencyLimit(kind="latency", max_ms=self.target_ms)
        )

    @property
    def by_table(self) -> bool:
        """Whether a latency table prices the search: what is counted needs none, and so
        no profile.
        """
        return isinstance(self.main_budget, LatencyLimit)

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a budget that is not set, so that searches from before it could be
        chosen stay up to date.
        """
        return {
            name: value
            for name, value in handler(self).items()
            if name != "budget" or value is not None
        }

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.budget is not None and self.target_ms is not None:
            raise ValueError(
                "search.target_ms is short for a search.budget of kind 'latency', and both are"
                " given; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _statistics(self) -> Self:
        if self.recalibration_images < 2 and not (
            self.recalibration_images == 0 and self.supernet.bn_track
        ):
            raise ValueError(
                f"recalibration_images is {self.recalibration_images}; give 2 or more, or 0 with"
                " supernet.bn_track = true for tracked ones"
            )
        if self.backbone is not None and self.weights is not None:
            raise ValueError(
                "search.backbone and search.weights both say what the super-net begins with; remove"
                " one of them"
            )
        return self
