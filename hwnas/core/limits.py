"""Budgets and limits: what a search has to meet, in milliseconds, multiply-accumulates,
parameters, bytes of weights or bytes of activations.

The same types describe the budget that a search aims at and the hard limits in
addition to it.
In an experiment's TOML file::

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

The number of ``search.budget`` is a target: the searched network meets it within
``search.tolerance``, from above or below. A latency budget uses the profiled table or
``search.table``. A limit is a maximum and always needs a number.

``Limits`` compiles the limits for a space. It checks each limit separately against what
the space can reach; whether all of them can be met together shows only in the search.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, Field

from hwnas.core.additive_cost import AdditiveCost
from hwnas.core.arch import Architecture
from hwnas.core.cost import BYTES, CostModel, Dtype, UnitName
from hwnas.core.graph import live_numbers
from hwnas.core.ops import Op
from hwnas.core.settings import Settings
from hwnas.core.space import Option, SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.errors import TargetError


def activation_bytes(op: Op, dtype: Dtype = "fp32") -> int:
    """Peak memory of the feature maps while an op runs on one image, in bytes: the
    maximum of ``Program.live_numbers``.

    This models the layer-by-layer execution of mobile runtimes. A runtime that fuses
    layers needs less; one that aligns buffers or never reuses them needs more.

    Example:
        >>> # the depthwise convolution: 48 + 48 maps, and 16 kept, of 8 x 8
        >>> activation_bytes(Op.parse("mbconv-h8-i16-o16-m48-k3-relu-id"), "int8")
        7168
    """
    return max(op.program.live_numbers()) * BYTES[dtype]


def peak_activation_bytes(arch: Architecture, dtype: Dtype = "fp32") -> int:
    """Peak memory of the feature maps of a network on one image, in bytes. For a chain,
    this is the largest ``activation_bytes`` of its ops.

    In a network of cells, the maps that later steps read stay alive while an op runs;
    see ``core.graph.live_numbers``.

    The predictors of a detector are assumed to run as soon as their feature map exists,
    and their results to be the output. A runtime that runs the predictors last keeps
    the tapped maps until then.
    """
    if arch.graph:
        image = (arch.in_channels, arch.size)
        return max(live_numbers(arch.graph, arch.blocks, image)) * BYTES[dtype]
    return max(activation_bytes(op, dtype) for op in arch.ops())


class PeakOfNetworks:
    """Peak activations in a space of cells.

    Which maps are alive depends on all picks, so each network is evaluated as a whole.
    ``largest_op`` is the peak over single ops. This class has the methods of
    ``AdditiveCost`` that limits need.
    """

    def __init__(self, space: SearchSpace, largest_op: AdditiveCost, dtype: Dtype) -> None:
        self.space = space
        self.largest_op = largest_op
        self.dtype = dtype

    def cost(self, picks: Mapping[str, Option]) -> float:
        """The peak of ``picks``, in bytes."""
        return float(peak_activation_bytes(self.space.decode(picks), self.dtype))

    def costs(self, index_NC: np.ndarray) -> np.ndarray:
        """The peaks of many networks, in bytes.

        ``index_NC`` holds option positions, int [N, choices]; returns float64 [N].
        """
        return np.array([self.cost(self.space.at(index_C)) for index_C in np.asarray(index_NC)])

    def bounds(self) -> tuple[float, float]:
        """A lower bound for all networks, and infinity, as no upper bound is known."""
        # A network needs at least what its largest op needs by itself.
        return self.largest_op.bounds()[0], np.inf


@dataclass(frozen=True)
class Compiled:
    """A limit applied to a space.

    ``title`` names the limited quantity, ``field`` the configuration key that holds the
    maximum, ``most``.

    For a peak, ``over`` counts the ops above the limit. Fixing one of several such ops
    lowers that count, while the peak itself may not change.
    """

    title: str
    field: str
    most: float
    additive_cost: AdditiveCost | PeakOfNetworks
    over: AdditiveCost | None = None

    @property
    def as_sum(self) -> tuple[AdditiveCost, float]:
        """An equivalent limit on a sum, for methods that need expectations: the sum and
        its maximum. For a peak, it says that no op is above the limit.
        """
        if self.over is not None:
            # The count is an integer: 0.5 separates "none" from "one or more".
            return self.over, 0.5
        assert isinstance(self.additive_cost, AdditiveCost), (
            "a limit that is not a sum over ops must count the ops above it"
        )
        return self.additive_cost, self.most


MOST = 10**18
"""The largest count. It is far beyond any network, and fits into 64 bits."""

Count = Annotated[int | float, Field(union_mode="left_to_right")]
"""A count. Whole numbers become integers, however they are written; computed targets
may have a fraction.
"""


class _Limit(Settings):
    """A maximum, or the target of ``search.budget``. Only the latter may leave its number
    open, for ``search.target_range``.
    """

    FIELD: ClassVar[str]
    UNIT: ClassVar[UnitName]

    @property
    def most(self) -> float | None:
        """The number, whatever its key."""
        most: float | None = getattr(self, self.FIELD)
        return most

    @abstractmethod
    def cost(
        self, space: SearchSpace, table: LatencyTable | None, allow_uncalibrated: bool
    ) -> CostModel:
        """The cost that is limited, for ``space``. Only latency uses ``table``."""

    def compiled(
        self,
        space: SearchSpace,
        load_table: Callable[[str], LatencyTable],
        allow_uncalibrated: bool,
    ) -> Compiled:
        """The limit applied to ``space``."""
        del load_table  # only latency needs a table
        return self._compiled(self.cost(space, None, allow_uncalibrated))

    def _compiled(self, cost: CostModel) -> Compiled:
        assert self.most is not None  # checked by ``Limit``
        return Compiled(cost.title, self.FIELD, self.most, cost.additive_cost)


class LatencyLimit(_Limit):
    """Latency predicted by a table. A limit names its own table, which may be of
    another device or runtime than the profiled one.
    """

    FIELD: ClassVar[str] = "max_ms"
    UNIT: ClassVar[UnitName] = "ms"

    kind: Literal["latency"]
    table: str | None = Field(None, description="path of a latency table; of a limit")
    max_ms: float | None = Field(None, gt=0, le=1e9)

    def cost(
        self, space: SearchSpace, table: LatencyTable | None, allow_uncalibrated: bool
    ) -> CostModel:
        """Predicted latency. Raises CoverageError if the table lacks ops of the space,
        TableError if it is not calibrated.
        """
        assert table is not None
        return CostModel.of_table(space, table, allow_uncalibrated=allow_uncalibrated)

    def compiled(
        self,
        space: SearchSpace,
        load_table: Callable[[str], LatencyTable],
        allow_uncalibrated: bool,
    ) -> Compiled:
        """The limit by the table that it names. Raises the errors of ``cost``."""
        assert self.table is not None  # checked by ``Limit``
        return self._compiled(self.cost(space, load_table(self.table), allow_uncalibrated))


class MacsLimit(_Limit):
    """Multiply-accumulates for one image."""

    FIELD: ClassVar[str] = "max_macs"
    UNIT: ClassVar[UnitName] = "macs"

    kind: Literal["macs"]
    max_macs: Count | None = Field(
        None, gt=0, le=MOST, description="multiply-accumulates, not millions of them"
    )

    def cost(
        self, space: SearchSpace, table: LatencyTable | None, allow_uncalibrated: bool
    ) -> CostModel:
        """The sum over ops."""
        return CostModel.of_macs(space)


class ParamsLimit(_Limit):
    """Trainable parameters."""

    FIELD: ClassVar[str] = "max_params"
    UNIT: ClassVar[UnitName] = "params"

    kind: Literal["params"]
    max_params: int | None = Field(
        None, gt=0, le=MOST, description="parameters, not millions of them"
    )

    def cost(
        self, space: SearchSpace, table: LatencyTable | None, allow_uncalibrated: bool
    ) -> CostModel:
        """The sum over ops."""
        return CostModel.of_params(space)


class SizeLimit(_Limit):
    """Bytes of the weights; see ``weight_bytes``."""

    FIELD: ClassVar[str] = "max_bytes"
    UNIT: ClassVar[UnitName] = "size_bytes"

    kind: Literal["size_bytes"]
    max_bytes: int | None = Field(None, gt=0, le=MOST)
    dtype: Dtype = "fp32"

    def cost(
        self, space: SearchSpace, table: LatencyTable | None, allow_uncalibrated: bool
    ) -> CostModel:
        """The sum over ops."""
        return CostModel.of_bytes(space, self.dtype)


class ActivationLimit(_Limit):
    """Peak bytes of feature maps at batch 1; see ``activation_bytes``."""

    FIELD: ClassVar[str] = "max_bytes"

    kind: Literal["activation_bytes"]
    max_bytes: int | None = Field(None, gt=0, le=MOST)
    dtype: Dtype = "fp32"

    def cost(
        self, space: SearchSpace, table: LatencyTable | None, allow_uncalibrated: bool
    ) -> CostModel:
        """Not available: a peak is not a sum, so no search can aim at it. ``Budget``
        rejects it.
        """
        raise AssertionError("a peak has no cost model")

    def compiled(
        self,
        space: SearchSpace,
        load_table: Callable[[str], LatencyTable],
        allow_uncalibrated: bool,
    ) -> Compiled:
        """The maximum over ops. In a space of cells, where maps of several ops are
        alive at once, the maximum over the steps of each network.
        """
        assert self.max_bytes is not None  # checked by ``Limit``
        most = self.max_bytes
        op_bytes = partial(activation_bytes, dtype=self.dtype)
        over = AdditiveCost.of_ops(space, lambda op: float(op_bytes(op) > most))
        largest_op = AdditiveCost.of_ops(space, op_bytes, reduce="max")
        peak = largest_op if space.CHAIN else PeakOfNetworks(space, largest_op, self.dtype)
        return Compiled(f"activation_bytes in {self.dtype}", self.FIELD, most, peak, over)


def _check_limit(limit: AnyBudget) -> AnyBudget:
    """Raise ValueError if a limit lacks what only a budget may leave open."""
    if limit.most is None:
        raise ValueError(f"{limit.FIELD} is missing: a limit needs its number")
    if isinstance(limit, LatencyLimit) and limit.table is None:
        raise ValueError("table is missing: a latency limit needs a table of its own")
    return limit


def _check_budget(budget: AnyBudget) -> AnyBudget:
    """Raise ValueError if a search cannot aim at ``budget``."""
    if isinstance(budget, ActivationLimit):
        raise ValueError(
            "kind = 'activation_bytes' is a peak, not a sum over blocks, so a search cannot aim at"
            " it; put it under search.limits, and choose another kind of budget"
        )
    if isinstance(budget, LatencyLimit) and budget.table is not None:
        raise ValueError("table is for limits; name the table of the budget in search.table")
    return budget


AnyBudget = LatencyLimit | MacsLimit | ParamsLimit | SizeLimit | ActivationLimit
Limit = Annotated[AnyBudget, Field(discriminator="kind"), AfterValidator(_check_limit)]
"""One entry of ``search.limits``."""
Budget = Annotated[AnyBudget, Field(discriminator="kind"), AfterValidator(_check_budget)]
"""``search.budget``."""


class Limits:
    """The hard limits of a search, compiled for a space. ``load_table`` reads the table
    that a latency limit names.

    Raises CoverageError or TableError if a table does not cover every architecture of
    the space.

    Example:
        >>> from hwnas.core.spaces import mobile32
        >>> space = mobile32()
        >>> limit = MacsLimit(kind="macs", max_macs=20_000_000)
        >>> limits = Limits(space, [limit], LatencyTable.load)
        >>> picks = space.sample(np.random.default_rng(0))
        >>> limits.feasible(space.index(picks)[None])
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
        """These limits and ``more``, such as a limit that a search method
        adds itself.
        """
        extended = copy(self)
        extended.compiled = (*self.compiled, *more)
        return extended

    @property
    def most(self) -> np.ndarray:
        """The maxima: float64 [limits]."""
        return np.array([limit.most for limit in self.compiled])

    def values(self, index_NC: np.ndarray) -> np.ndarray:
        """The limited quantities of many architectures.

        ``index_NC`` holds option positions, int [N, choices]; returns float64
        [N, limits].
        """
        columns = [limit.additive_cost.costs(index_NC) for limit in self.compiled]
        return _stacked(columns, len(index_NC))

    def excess(self, index_NC: np.ndarray) -> np.ndarray:
        """How far each limit is exceeded, relative to it: value / maximum - 1, so at
        most 0 if the limit is met. float64 [N, limits].
        """
        excess: np.ndarray = self.values(index_NC) / self.most - 1
        return excess

    def overruns(self, index_NC: np.ndarray) -> np.ndarray:
        """Like ``excess``, but for ``Compiled.as_sum``, which counts the ops above a
        peak's limit. Local search follows these. float64 [N, limits].
        """
        columns = []
        for limit in self.compiled:
            additive_cost, most = limit.as_sum
            # A maximum of 0 gives no scale to measure the overrun by.
            scale = most if most > 0 else 1.0
            columns.append((additive_cost.costs(index_NC) - most) / scale)
        return _stacked(columns, len(index_NC))

    def feasible(self, index_NC: np.ndarray) -> np.ndarray:
        """Whether each architecture meets all limits: bool [N]."""
        return np.asarray((self.values(index_NC) <= self.most).all(axis=1))

    def describe(self, picks: Mapping[str, Option]) -> dict[str, float]:
        """The limited quantities of ``picks`` by name: ``{"macs": 2.1e7, "latency_ms on
        board/litert-int8-1t": 11.9}``.
        """
        return {limit.title: limit.additive_cost.cost(picks) for limit in self.compiled}

    def check(self) -> None:
        """Raise TargetError, with the reachable range, if any single limit cannot be
        met by any architecture.
        """
        for i, limit in enumerate(self.compiled):
            low, high = limit.additive_cost.bounds()
            if low > limit.most:
                raise TargetError(
                    f"limit {limit.title} <= {_shown(limit.most)} is out of reach of space"
                    f" {self.space.name}: its architectures have {_shown(low)} to {_shown(high)};"
                    f" raise search.limits[{i}].{limit.field} into that range, or search a smaller"
                    " space."
                )


def _stacked(columns: list[np.ndarray], rows: int) -> np.ndarray:
    """Columns [rows] side by side: [rows, columns]. Without columns, numpy could not
    tell the number of rows.
    """
    return np.stack(columns, axis=1) if columns else np.zeros((rows, 0))


def _shown(value: float) -> str:
    """Counts in full, so that the printed bound can be used as a limit; other values
    with six digits.
    """
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.6g}"
