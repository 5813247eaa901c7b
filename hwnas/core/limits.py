"""Budgets: what a search has to meet, in milliseconds, multiply-accumulates,
parameters, bytes of weights or of activations.

One type says what is aimed at, and the hard limits beside it. In an experiment's TOML file::

    [search.budget]
    kind = "macs"
    max_macs = 38_000_000

    [[search.limits]]
    kind = "latency"
    table = "tables/board.json"
    max_ms = 12.5

    [[search.limits]]
    kind = "activation_bytes"
    max_bytes = 500_000
    dtype = "int8"

The number of ``search.budget`` is the target, which the searched network meets within
``search.tolerance``, from above or below; a search towards latency is by the profiled
table, or that of ``search.table``. A limit is a maximum, and always has its number.

``Limits`` compiles the limits for a space. Each limit alone is checked against what the
space can reach; whether all can be met together is left to the finder.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hwnas.core.additive_cost import AdditiveCost
from hwnas.core.arch import Architecture
from hwnas.core.cost import BYTES, CostModel, Dtype, UnitName
from hwnas.core.graph import live_numbers
from hwnas.core.ops import Op
from hwnas.core.space import Option, SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.errors import TargetError


def activation_bytes(op: Op, dtype: Dtype = "fp32") -> int:
    """Peak memory of feature maps while an op runs on one image, in bytes: the most
    that ``Program.live_numbers`` says.

    This is the layer-by-layer execution of mobile runtimes; one that fuses layers, or
    aligns and never reuses buffers, needs less or more.

    Example:
        >>> activation_bytes(Op.parse("mbconv-h8-i16-o16-m48-k3-relu-id"), "int8")  # depthwise: 48 + 48, and 16 kept, of 8 x 8
        7168
    """
    return max(op.program.live_numbers()) * BYTES[dtype]


def peak_activation_bytes(arch: Architecture, dtype: Dtype = "fp32") -> int:
    """Peak memory of feature maps of a network on one image: of a chain the largest
    ``activation_bytes`` of its ops.

    In a network of cells the maps that later steps read are alive beside an op; see
    ``core.graph.live_numbers``.

    A detector's predictors are taken to run as soon as there is a map for them, and
    what they predict to be the output: a runtime that leaves the predictors for the end
    keeps the tapped maps until then.
    """
    if arch.graph:
        image = (arch.in_channels, arch.resolution)
        return max(live_numbers(arch.graph, arch.blocks, image)) * BYTES[dtype]
    return max(activation_bytes(op, dtype) for op in arch.ops())


class PeakOfNetworks:
    """Peak activations of the networks of a space of cells: what is alive depends on
    all picks, so each network is looked at.

    It has the methods of a ``AdditiveCost`` that limits need.
    """

    def __init__(self, space: SearchSpace, alone: AdditiveCost, dtype: Dtype) -> None:
        self.space, self.alone, self.dtype = space, alone, dtype

    def cost(self, picks: Mapping[str, Option]) -> float:
        """The peak of picks, in bytes."""
        return float(peak_activation_bytes(self.space.decode(picks), self.dtype))

    def costs(self, index_NC: np.ndarray) -> np.ndarray:
        """The peaks of many picks: option positions int [N, choices] -> float64 [N]."""
        return np.array([self.cost(self.space.at(index_C)) for index_C in np.asarray(index_NC)])

    def range(self) -> tuple[float, float]:
        """A lower bound of all networks: their largest op alone needs as much. And no
        upper bound.
        """
        return self.alone.range()[0], np.inf


@dataclass(frozen=True)
class Compiled:
    """A limit applied to a space. ``title`` names the value with its unit, ``field``
    the key of the configuration.

    Of a peak, ``over`` counts the ops above the limit: fixing one of several such ops
    lowers it, which the peak itself may not show.
    """

    title: str
    field: str
    most: float
    additive_cost: AdditiveCost | PeakOfNetworks
    over: AdditiveCost | None = None

    @property
    def as_sum(self) -> tuple[AdditiveCost, float]:
        """A sum and its maximum that say the same, for what needs expectations: for a
        peak, no op is above the limit.
        """
        if self.over is not None:
            return self.over, 0.5
        assert isinstance(self.additive_cost, AdditiveCost), (
            "what is no sum of ops says which ops are above the limit"
        )
        return self.additive_cost, self.most


Count = Annotated[int | float, Field(union_mode="left_to_right")]
"""A count; as a target, it may be a computed one. A whole number is always an integer,
however it is written.
"""


class _Limit(BaseModel):
    """``most`` is the limit, or the target of ``search.budget``; only the latter may
    leave it open, for ``search.target_range``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    FIELD: ClassVar[str]
    UNIT: ClassVar[UnitName]

    @property
    def most(self) -> float | None:
        """The number, whatever its key."""
        found: float | None = getattr(self, self.FIELD)
        return found

    @abstractmethod
    def cost(
        self, space: SearchSpace, table: LatencyTable | None, allow_uncalibrated: bool
    ) -> CostModel:
        """What is limited, of ``space``; ``table`` is for latency alone."""

    def compiled(
        self,
        space: SearchSpace,
        load_table: Callable[[str], LatencyTable],
        allow_uncalibrated: bool,
    ) -> Compiled:
        """The limit for ``space``."""
        del load_table
        return self._compiled(self.cost(space, None, allow_uncalibrated))

    def _compiled(self, cost: CostModel) -> Compiled:
        assert self.most is not None  # see ``Limit``
        return Compiled(cost.title, self.FIELD, self.most, cost.additive_cost)


class LatencyLimit(_Limit):
    """Predicted latency by a table; as a limit, by one of its own, which may be another
    device's or another runtime's.
    """

    FIELD: ClassVar[str] = "max_ms"
    UNIT: ClassVar[UnitName] = "ms"

    kind: Literal["latency"]
    table: str | None = Field(None, description="path of a latency table; of a limit")
    max_ms: float | None = Field(None, gt=0)

    def cost(
        self, space: SearchSpace, table: LatencyTable | None, allow_uncalibrated: bool
    ) -> CostModel:
        """Raises CoverageError where the table lacks ops of the space, TableError where
        it is not calibrated.
        """
        assert table is not None
        return CostModel.of_table(space, table, allow_uncalibrated=allow_uncalibrated)

    def compiled(
        self,
        space: SearchSpace,
        load_table: Callable[[str], LatencyTable],
        allow_uncalibrated: bool,
    ) -> Compiled:
        """By the table that the limit names. Raises as ``cost`` does."""
        assert self.table is not None  # see ``Limit``
        return self._compiled(self.cost(space, load_table(self.table), allow_uncalibrated))


class MacsLimit(_Limit):
    """Multiply-accumulates for one image."""

    FIELD: ClassVar[str] = "max_macs"
    UNIT: ClassVar[UnitName] = "macs"

    kind: Literal["macs"]
    max_macs: Count | None = Field(
        None, gt=0, description="multiply-accumulates, not millions of them"
    )

    def cost(
        self, space: SearchSpace, table: LatencyTable | None, allow_uncalibrated: bool
    ) -> CostModel:
        """Sums over ops."""
        return CostModel.of_macs(space)


class ParamsLimit(_Limit):
    """Trainable parameters."""

    FIELD: ClassVar[str] = "max_params"
    UNIT: ClassVar[UnitName] = "params"

    kind: Literal["params"]
    max_params: int | None = Field(None, gt=0, description="parameters, not millions of them")

    def cost(
        self, space: SearchSpace, table: LatencyTable | None, allow_uncalibrated: bool
    ) -> CostModel:
        """Sums over ops."""
        return CostModel.of_params(space)


class SizeLimit(_Limit):
    """Bytes of the weights; see ``weight_bytes``."""

    FIELD: ClassVar[str] = "max_bytes"
    UNIT: ClassVar[UnitName] = "size_bytes"

    kind: Literal["size_bytes"]
    max_bytes: int | None = Field(None, gt=0)
    dtype: Dtype = "fp32"

    def cost(
        self, space: SearchSpace, table: LatencyTable | None, allow_uncalibrated: bool
    ) -> CostModel:
        """Sums over ops."""
        return CostModel.of_bytes(space, self.dtype)


class ActivationLimit(_Limit):
    """Peak bytes of feature maps at batch 1; see ``activation_bytes``."""

    FIELD: ClassVar[str] = "max_bytes"

    kind: Literal["activation_bytes"]
    max_bytes: int | None = Field(None, gt=0)
    dtype: Dtype = "fp32"

    def cost(
        self, space: SearchSpace, table: LatencyTable | None, allow_uncalibrated: bool
    ) -> CostModel:
        """Never: a peak is no sum, so nothing is searched towards it. See ``Budget``."""
        raise AssertionError("a peak has no cost model")

    def compiled(
        self,
        space: SearchSpace,
        load_table: Callable[[str], LatencyTable],
        allow_uncalibrated: bool,
    ) -> Compiled:
        """The maximum over ops; of cells, in which several ops' maps are alive at once,
        over the steps of each network.
        """
        assert self.max_bytes is not None  # see ``Limit``
        most, price = self.max_bytes, partial(activation_bytes, dtype=self.dtype)
        over = AdditiveCost.of_ops(space, lambda op: float(price(op) > most))
        alone = AdditiveCost.of_ops(space, price, reduce="max")
        peak = alone if space.CHAIN else PeakOfNetworks(space, alone, self.dtype)
        return Compiled(f"activation_bytes in {self.dtype}", self.FIELD, most, peak, over)


def _with_number(limit: AnyBudget) -> AnyBudget:
    """A limit with all that only a budget may leave open."""
    if limit.most is None:
        raise ValueError(f"{limit.FIELD} is missing: a limit needs its number")
    if isinstance(limit, LatencyLimit) and limit.table is None:
        raise ValueError("table is missing: a limit of latency is by a table of its own")
    return limit


def _to_aim_at(budget: AnyBudget) -> AnyBudget:
    """A budget that a search can aim at."""
    if isinstance(budget, ActivationLimit):
        raise ValueError(
            "kind = 'activation_bytes' is a peak and no sum over blocks, so a search cannot aim at"
            " it; put it under search.limits, and choose another kind of budget"
        )
    if isinstance(budget, LatencyLimit) and budget.table is not None:
        raise ValueError("table is for limits; name the table of the budget in search.table")
    return budget


AnyBudget = LatencyLimit | MacsLimit | ParamsLimit | SizeLimit | ActivationLimit
Limit = Annotated[AnyBudget, Field(discriminator="kind"), AfterValidator(_with_number)]
"""One entry of ``search.limits``."""
Budget = Annotated[AnyBudget, Field(discriminator="kind"), AfterValidator(_to_aim_at)]
"""``search.budget``."""


class Limits:
    """Hard limits of a space, compiled. ``load_table`` reads the table that a latency limit names.

    Raises CoverageError or TableError where a table cannot price every architecture of the space.

    Example:
        >>> from hwnas.core.spaces import mobile32
        >>> limits = Limits(mobile32(), [MacsLimit(kind="macs", max_macs=20_000_000)], LatencyTable.load)
        >>> limits.feasible(mobile32().index(mobile32().sample(np.random.default_rng(0)))[None])
        array([ True])
    """

    def __init__(
        self,
        space: SearchSpace,
        limits: Sequence[Limit],
        load_table: Callable[[str], LatencyTable],
        *,
        allow_uncalibrated: bool = False,
    ) -> None:
        self.space = space
        self.compiled = tuple(
            limit.compiled(space, load_table, allow_uncalibrated) for limit in limits
        )

    def also(self, *more: Compiled) -> Limits:
        """These limits and ``more``, such as one that a method sets on a count of its own."""
        extended = copy(self)
        extended.compiled = (*self.compiled, *more)
        return extended

    @property
    def most(self) -> np.ndarray:
        """The maxima: float64 [limits]."""
        return np.array([each.most for each in self.compiled])

    def values(self, index_NC: np.ndarray) -> np.ndarray:
        """What is limited, of many picks: option positions int [N, choices] -> float64
        [N, limits].
        """
        columns = [each.additive_cost.costs(index_NC) for each in self.compiled]
        return np.stack(columns, axis=1) if columns else np.zeros((len(index_NC), 0))

    def excess(self, index_NC: np.ndarray) -> np.ndarray:
        """By which part each limit is exceeded, float64 [N, limits]: value / maximum -
        1, at most 0 where it is met.
        """
        parts: np.ndarray = self.values(index_NC) / self.most - 1
        return parts

    def overruns(self, index_NC: np.ndarray) -> np.ndarray:
        """As ``excess``, but of ``Compiled.as_sum``: of peaks, the ops above the limit.
        For searching by small changes. [N, limits].
        """
        sums = [each.as_sum for each in self.compiled]
        columns = [
            (additive_cost.costs(index_NC) - most) / (most if most > 0 else 1.0)
            for additive_cost, most in sums
        ]
        return np.stack(columns, axis=1) if columns else np.zeros((len(index_NC), 0))

    def feasible(self, index_NC: np.ndarray) -> np.ndarray:
        """Which picks meet all limits: bool [N]."""
        return np.asarray((self.values(index_NC) <= self.most).all(axis=1))

    def describe(self, picks: Mapping[str, Option]) -> dict[str, float]:
        """What is limited, of picks, by name: ``{"macs": 2.1e7, "latency_ms on
        board/litert-int8-1t": 11.9}``.
        """
        return {each.title: each.additive_cost.cost(picks) for each in self.compiled}

    def check(self) -> None:
        """Raise TargetError, printing the reachable range, where no architecture meets
        one of the limits, taken alone.
        """
        for i, each in enumerate(self.compiled):
            low, high = each.additive_cost.range()
            if low > each.most:
                raise TargetError(
                    f"limit {each.title} <= {_shown(each.most)} is out of reach of space"
                    f" {self.space.name}: its architectures have {_shown(low)} to {_shown(high)};"
                    f" raise search.limits[{i}].{each.field} into that range, or search a smaller"
                    " space."
                )


def _shown(value: float) -> str:
    """Counts in full, so that the printed bound can be set as it is; times with six digits."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.6g}"
