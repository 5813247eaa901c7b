"""The table ``search``: how a super-net is trained and the space is searched."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from hwnas.config.base import (
    BatchSize,
    Epochs,
    Images,
    Plugin,
    Section,
    check_model_of_file,
    with_defaults,
    without_defaults,
)
from hwnas.core.limits import AnyBudget, Budget, LatencyLimit, Limit
from hwnas.core.objective import AbsoluteObjective, Objective
from hwnas.core.settings import Settings

ADAMW = {"lr": 0.024, "weight_decay": 0.02, "warmup": 0.1}
"""Defaults for ``adamw``, from our recipes. TuNAS's learning rate is for RMSprop with
an eps of 1 and does not suit it.
"""


class CosineSchedule(Settings):
    """Half a cosine from the peak to the end, once or, with warm restarts (SGDR, arXiv
    1608.03983), several times.
    """

    kind: Literal["cosine"] = "cosine"
    final: float = Field(
        0.0, ge=0, le=1, description="learning rate at the end, as a fraction of the peak"
    )
    cycles: int = Field(
        1, ge=1, le=10_000, description="number of cosines, each from the peak; equally long"
    )


class StepSchedule(Settings):
    """The peak, multiplied by ``rate`` several times at equal distances: 3 times by 0.1 in
    FBNet, 145 times by 0.97 in MnasNet.
    """

    kind: Literal["step"]
    rate: float = Field(0.1, gt=0, le=1, description="factor of the learning rate")
    times: int = Field(3, ge=1, le=1_000_000, description="how often it is applied")


class ConstantSchedule(Settings):
    """The peak, to the end."""

    kind: Literal["constant"]


Schedule = Annotated[CosineSchedule | StepSchedule | ConstantSchedule, Field(discriminator="kind")]
"""How the learning rate falls after the warm-up."""

OptimizerOption = Annotated[float, Field(ge=-1e6, le=1e6)]
"""A number among the further arguments of an optimiser."""

OPTIMIZER_UNSET: dict[str, Any] = {
    "layer_decay": 1.0,
    "schedule": CosineSchedule().model_dump(),
}
"""Keys of an optimiser that are left out of documents at these values, their defaults."""

SEARCH_UNSET: dict[str, Any] = {"budget": None, "pretrained": None, "pretrained_model": None}
"""Keys of ``search`` that are left out of documents at these values, their defaults."""


class OptimizerConfig(Section):
    """The optimiser of network weights.

    The defaults are those of TuNAS: rmsproptf with a learning rate of 0.165 per 256
    images, momentum and squared-gradient decay 0.9, and eps 1. With ``name = "adamw"``
    they are a learning rate of 0.024, weight decay 0.02 and warm-up 0.1. In short
    training runs, neither optimiser was better on both a subset of CIFAR-10 and the
    raccoon photographs.
    """

    name: str = Field(
        "rmsproptf",
        description="name in timm; 'sgd' has Nesterov momentum, 'momentum' has plain momentum",
    )
    lr: float = Field(
        0.165,
        gt=0,
        le=1e12,
        description="peak learning rate for a batch of 256 images; scaled linearly with batch_size",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="not used by optimisers without momentum")
    weight_decay: float = Field(
        4e-5,
        ge=0,
        le=1000,
        description="weight_decay * w is added to the gradient; TuNAS: l2(weight_decay / 2)",
    )
    options: dict[str, OptimizerOption | tuple[OptimizerOption, ...]] | None = Field(
        None,
        description=(
            "further arguments of the optimiser, numbers or lists of them, such as betas; default"
            " for rmsproptf: alpha 0.9, eps 1 (TuNAS)"
        ),
    )
    warmup: float = Field(
        0.025,
        ge=0,
        lt=1,
        description=(
            "fraction of the steps in which the learning rate rises linearly; it then follows the"
            " schedule"
        ),
    )
    schedule: Schedule = CosineSchedule()
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description=(
            "the learning rate of each block is that of the next one times this: 0.8 fine-tunes the"
            " first blocks slowly; 1: all learn alike"
        ),
    )
    clip_norm: float | None = Field(
        None, gt=0, le=1e9, description="maximum global norm of the gradient; default: no clipping"
    )
    inactive_weights: Literal["frozen", "decay"] = Field(
        "frozen",
        description=(
            "weights that a step does not use: frozen leaves them unchanged (SPOS); decay continues"
            " to apply momentum and weight decay once they have been used (NAS-Bench-201's code)"
        ),
    )

    @model_validator(mode="wrap")
    @classmethod
    def _named_defaults(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Fill in the defaults of the named optimiser, unset as far as the
        user goes.
        """
        defaults = ADAMW if isinstance(given, dict) and given.get("name") == "adamw" else {}
        return with_defaults(given, defaults, handler)

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit keys that are not set: the hash of runs from before these keys existed must
        not change.
        """
        content: dict[str, Any] = handler(self)
        return without_defaults(content, OPTIMIZER_UNSET)


OperationOn = Literal["node", "edge", "op"]
"""How finely the weights of a slot are split, from most to least shared."""


class SupernetConfig(Section):
    """How the super-net shares its weights. The defaults are those of TuNAS.

    The keys cover the 14 heuristics of Yu, Ranftl, Salzmann, "How to Train Your
    Super-Net" (arXiv 2003.04276). Mapping of weights: ``channels`` (dynamic
    channelling), ``kernels`` (OFA kernel), ``wsbn``, ``dropout`` (global),
    ``path_dropout``, ``operation_on``; low fidelity: ``proxy_depth`` (layers),
    ``proxy_width`` (channels), ``search.data_portion`` and ``search.batch_size``, and
    our own ``proxy_resolution`` (pixels); protocol: ``bn_affine`` and ``bn_track``,
    ``search.optimizer.lr`` with ``search.epochs``, ``search.optimizer.weight_decay``,
    and the sampling of paths (``sampling`` of the strategy spos). Options of cells
    share no weights, so only ``dropout`` of the mapping applies to them.
    """

    sharing: Literal["auto", "collapsed", "separate"] = Field(
        "auto",
        description=(
            "collapsed: options of a slot share the expansion and projection layers (TuNAS);"
            " separate: each option has its own weights; auto: as in the paper of the strategy"
        ),
    )
    kernels: Literal["auto", "own", "ofa", "ofa_transform"] = Field(
        "auto",
        description=(
            "own: separate weights for each kernel size; ofa: smaller kernels are the centre of the"
            " largest (Once-for-all); ofa_transform: the centre times a learned matrix; auto: as in"
            " the paper of the strategy"
        ),
    )
    channels: Literal["first", "chunk", "random", "interpolation"] = Field(
        "first",
        description=(
            "which channels of the widest layer a narrower one uses. first: the first ones; chunk:"
            " contiguous ones from a random position; random: any ones; interpolation: averages"
        ),
    )
    operation_on: OperationOn = Field(
        "node",
        description=(
            "node: one set of weights per slot; edge: one for each slot that the input comes from;"
            " op: one for each slot and option that it comes from"
        ),
    )
    wsbn: bool = Field(
        False,
        description=(
            "separate BN layers for each slot that the input comes from (with operation_on = 'op':"
            " for each slot and option)"
        ),
    )
    initialisation: Literal["auto", "he", "torch"] = Field(
        "auto",
        description=(
            "initial weights of blocks. he: normal, scaled by fan-in (TuNAS); torch: PyTorch's"
            " default, with a sixth of that variance; auto: torch for cells, he otherwise"
        ),
    )
    bn_affine: bool = Field(True, description="BN layers have a learned scale and shift")
    bn_track: bool = Field(
        False, description="BN layers track running statistics, and evaluations can use them"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability before the classifier")
    path_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "probability of dropping a residual branch in the last layer at the end of training;"
            " rises linearly with depth and with the steps (NAO)"
        ),
    )
    proxy_depth: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="maximum number of slots (or cells) per stage during training; default: all",
    )
    proxy_width: float = Field(
        1.0, gt=0, le=1, description="factor of all channel counts during training"
    )
    proxy_resolution: int | None = Field(
        None,
        ge=8,
        le=4096,
        description=(
            "height and width in pixels of the images during training; default: the full resolution"
            " (our extension)"
        ),
    )
    full_resolution: float = Field(
        0.0,
        ge=0,
        le=1,
        description="with proxy_resolution: last fraction of the steps, at full resolution",
    )
    remat: bool = Field(
        True,
        description=(
            "recompute the options of a mixture in the backward pass, which saves memory;"
            " strategies that train single paths never need it"
        ),
    )

    @model_validator(mode="after")
    def _check_supernet(self) -> Self:
        # tracked statistics belong to a channel, which these two mix or scatter
        if self.bn_track and self.channels in ("random", "interpolation"):
            raise ValueError(
                "bn_track needs contiguous channels; set channels = 'first' or 'chunk', not"
                f" {self.channels!r}"
            )
        if self.full_resolution and self.proxy_resolution is None:
            raise ValueError(
                f"full_resolution = {self.full_resolution:g} says when a proxy_resolution ends; set"
                " proxy_resolution as well"
            )
        return self


class SearchConfig(Section):
    """How the space is searched."""

    strategy: Plugin = Field(
        Plugin(name="tunas"),
        description=(
            "search strategy: a name, or a table of its name and its own options. The optimiser and"
            " the epochs are those of the file; the recipes fbnet, darts and pdarts bring those of"
            " the papers"
        ),
    )
    objective: Objective = Field(
        AbsoluteObjective(),
        discriminator="name",
        description="how quality and cost are combined into one reward",
    )
    target_ms: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="latency budget in milliseconds; shorthand for a budget of kind 'latency'",
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
            "target for a budget without a number: 0 is the cost of the fastest (or smallest)"
            " architecture of the space, 1 that of the slowest"
        ),
    )
    tolerance: float = Field(
        0.02,
        gt=0,
        lt=1,
        description=(
            "maximum relative difference between the predicted cost of the result and the target"
        ),
    )
    table: str | None = Field(
        None, description="path of a latency table to use instead of profiling"
    )
    allow_uncalibrated: bool = Field(
        False, description="accept a latency table that was not calibrated on whole networks"
    )
    epochs: Epochs = Field(20, description="epochs of training of the super-net")
    batch_size: BatchSize = Field(64, description="images per training step")
    optimizer: OptimizerConfig = OptimizerConfig()
    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="label smoothing of the training loss (classification)"
    )
    supernet: SupernetConfig = SupernetConfig()
    data_portion: float = Field(
        1.0, gt=0, le=1, description="fraction of the training images that the super-net sees"
    )
    weights: str | None = Field(
        None,
        description=(
            "search folder of an earlier run, whose trained super-net is used unchanged; only the"
            " finder runs"
        ),
    )
    pretrained: str | None = Field(
        None,
        min_length=1,
        description=(
            "weights that all options of the super-net start from: a file (.pth, .safetensors), the"
            " folder of an earlier run, or the name of a timm model whose weights are in its cache"
        ),
    )
    pretrained_model: str | None = Field(
        None, description="the timm model that the file of search.pretrained belongs to"
    )
    backbone: str | None = Field(
        None,
        description=(
            "detection: search folder of a classification run, whose backbone weights initialise"
            " this super-net"
        ),
    )
    quality: Literal["metric", "loss"] = Field(
        "metric",
        description=(
            "how architectures are evaluated on held-out images, and what classifiers are rewarded"
            " for. metric: accuracy or AP; loss: 1 / (1 + loss), for few images or epochs"
        ),
    )
    finder: Plugin | None = Field(
        None,
        description="how architectures are found after training; default: the strategy's own way",
    )
    limits: tuple[Limit, ...] = Field(
        (),
        max_length=100,
        description=(
            "further constraints, one [[search.limits]] each: other latency tables, macs, params,"
            " size_bytes, activation_bytes"
        ),
    )
    candidates: int = Field(
        8,
        ge=1,
        le=100_000,
        description=(
            "number of architectures in the final ranking by recalibrated held-out accuracy (or AP)"
        ),
    )
    recalibration_images: int = Field(
        1024,
        ge=0,
        le=10**9,
        description=(
            "training images that re-estimate BN statistics before each evaluation; 0: use tracked"
            " statistics (supernet.bn_track)"
        ),
    )
    evaluation_images: Images = Field(
        1000,
        description=(
            "held-out images on which a finder evaluates; the final ranking uses all of them"
        ),
    )
    random_samples: int | None = Field(
        None,
        ge=0,
        le=100_000,
        description=(
            "number of random architectures scored for comparison, once within the budget and once"
            " in the whole space; default: 4 to 8, so that they and the final ranking take at most"
            " a fifth of the search's cost"
        ),
    )

    @property
    def main_budget(self) -> AnyBudget:
        """``budget``, or the latency budget that ``target_ms`` is shorthand for."""
        if self.budget is not None:
            return self.budget
        return LatencyLimit(kind="latency", max_ms=self.target_ms)

    @property
    def by_table(self) -> bool:
        """Whether costs come from a latency table. Counted costs (MACs, parameters,
        bytes) need no table, and thus no profile.
        """
        return isinstance(self.main_budget, LatencyLimit)

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit keys that are not set: the hash of searches from before these keys
        existed must not change.
        """
        content: dict[str, Any] = handler(self)
        return without_defaults(content, SEARCH_UNSET)

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.budget is not None and self.target_ms is not None:
            raise ValueError(
                "search.target_ms is shorthand for a search.budget of kind 'latency', and both are"
                " given; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_statistics(self) -> Self:
        # BN needs two values per channel, and at the end of a network a map is one pixel
        uses_tracked = self.recalibration_images == 0 and self.supernet.bn_track
        if self.recalibration_images < 2 and not uses_tracked:
            raise ValueError(
                f"recalibration_images is {self.recalibration_images}; give 2 or more, or 0 with"
                " supernet.bn_track = true to use tracked statistics"
            )
        initial = [
            key for key in ("pretrained", "backbone", "weights") if getattr(self, key) is not None
        ]
        if len(initial) > 1:
            raise ValueError(
                f"search.{initial[0]} and search.{initial[1]} both set the initial weights of the"
                " super-net; remove one of them"
            )
        check_model_of_file("search.pretrained", self.pretrained, self.pretrained_model)
        return self
