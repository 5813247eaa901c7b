"""What architectures cost: milliseconds predicted by a latency table,
multiply-accumulates, parameters, or bytes of their weights.

    cost(picks) = fixed + sum of the costs of its ops

With a latency table, the fixed part is the intercept of its calibration, and the ops
cost its calibrated entries. Counted costs have no fixed part. ``additive_cost``
computes exact and expected costs over a whole space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from hwnas.core.additive_cost import AdditiveCost
from hwnas.core.arch import Architecture
from hwnas.core.ops import Op
from hwnas.core.space import Option, SearchSpace, Term
from hwnas.core.table import LatencyTable
from hwnas.errors import CoverageError, TableError, TargetError

Dtype: TypeAlias = Literal["fp32", "int8"]
BYTES: dict[Dtype, int] = {"fp32": 4, "int8": 1}
"""Bytes per number."""

UnitName: TypeAlias = Literal["ms", "macs", "params", "size_bytes"]

MAX_LISTED_OPS = 5
"""How many missing ops an error message lists; the rest are counted."""


@dataclass(frozen=True)
class Unit:
    """The unit of a cost, and how it is displayed: divided by ``scale``, followed by
    ``symbol``.

    ``quantity`` names the cost among the limits and in search logs, ``noun`` in
    sentences.
    """

    name: UnitName
    quantity: str
    symbol: str
    noun: str
    scale: float = 1.0

    @property
    def expected(self) -> str:
        """The name of an expected cost in search logs."""
        return f"expected_{self.name}"

    @property
    def axis(self) -> str:
        """The axis label in figures: ``latency, ms``, but just ``M MACs``."""
        # The symbols of counted costs already contain the noun.
        return f"{self.noun}, {self.symbol}" if self.name == "ms" else self.symbol

    def shown(self, *costs: float) -> str:
        """One or more costs in words.

        Example:
            >>> UNITS["macs"].shown(38_040_000), UNITS["ms"].shown(1.5, 2.25)
            ('38.04 M MACs', '1.5 to 2.25 ms')
        """
        numbers = " to ".join(f"{cost / self.scale:.4g}" for cost in costs)
        return f"{numbers} {self.symbol}"


UNITS: dict[UnitName, Unit] = {
    unit.name: unit
    for unit in (
        Unit("ms", "latency_ms", "ms", "latency"),
        Unit("macs", "macs", "M MACs", "MACs", 1e6),
        Unit("params", "params", "M parameters", "parameters", 1e6),
        Unit("size_bytes", "size_bytes", "MB of weights", "size", 1e6),
    )
}

UNCALIBRATED = (
    "table {title} has no calibration against whole networks, so its sums are off by an unknown"
    " factor: profile with profile.fit_networks >= 3, or set search.allow_uncalibrated = true."
)


def missing_ops(ops: Sequence[Op], table: LatencyTable) -> tuple[str, ...]:
    """Keys of the ops that ``table`` has no entry for, in order."""
    return tuple(op.key for op in ops if op.key not in table.entries)


def check_coverage(ops: Sequence[Op], table: LatencyTable, of: str) -> None:
    """Raise CoverageError, naming the missing ops, if ``table`` does not cover ``ops``.
    Missing latencies are never guessed.

    ``of`` says in the message what the ops belong to.
    """
    missing = missing_ops(ops, table)
    if missing:
        names = ", ".join(missing[:MAX_LISTED_OPS])
        if len(missing) > MAX_LISTED_OPS:
            names += f" and {len(missing) - MAX_LISTED_OPS} more"
        raise CoverageError(
            f"table {table.title} (made for {table.header.space}) lacks {len(missing)} of the"
            f" {len(ops)} ops of {of}: {names}. Profile this space on the device.",
            missing,
        )


def latency_ms(arch: Architecture, table: LatencyTable) -> float:
    """Predicted latency of a finished network in milliseconds: the calibrated sum over
    its ops.

    Raises CoverageError if ``table`` lacks any of its ops.
    """
    check_coverage(arch.ops(), table, f"architecture {arch.name!r}")
    return _intercept_ms(table) + sum(op_ms(op, table) for op in arch.ops())


def op_ms(op: Op, table: LatencyTable) -> float:
    """What an op costs inside a network, in milliseconds."""
    entry_ms = table.entries[op.key].ms
    if table.calibration is None:
        return entry_ms
    return table.calibration.op_ms(entry_ms, op)


def _intercept_ms(table: LatencyTable) -> float:
    return table.calibration.intercept_ms if table.calibration is not None else 0.0


@dataclass(frozen=True)
class CostModel:
    """The cost of every architecture of a space in one unit. Made by ``of_table``,
    ``of_macs``, ``of_params`` or ``of_bytes``.

    ``title`` names the cost and its source, such as ``latency_ms on
    board/litert-int8-1t``. ``table`` is the latency table that the costs come from, or
    None if they are counted.

    Example:
        >>> cost_model = CostModel.of_table(space, table)   # doctest: +SKIP
        >>> cost_model.cost(space.sample(rng))              # doctest: +SKIP
        31.2
    """

    additive_cost: AdditiveCost
    unit: Unit
    title: str
    table: LatencyTable | None = None

    @classmethod
    def of_table(
        cls, space: SearchSpace, table: LatencyTable, *, allow_uncalibrated: bool = False
    ) -> CostModel:
        """Latency in milliseconds.

        Raises CoverageError or TableError if the table does not cover every
        architecture of the space, and TableError if it is not calibrated, unless
        ``allow_uncalibrated`` is set.
        """
        if table.calibration is None and not allow_uncalibrated:
            raise TableError(UNCALIBRATED.format(title=table.title))
        if not table.slots:
            check_coverage(space.ops, table, f"space {space.name}")
        # Coefficients belong to positions, so they mean nothing in another space, even
        # if all of this space's slots are among them.
        foreign = sorted(table.slots.keys() - {term.slot for term in space.terms()})
        if foreign:
            raise TableError(
                f"table {table.title} has costs for slots of another space"
                f" ({', '.join(foreign[:5])}): space {space.name} does not have these slots."
            )
        fixed_ms = _intercept_ms(table)
        if table.slots:
            additive_cost = AdditiveCost(
                space, lambda term: _positional_ms(term, table, space), fixed=fixed_ms
            )
        else:
            additive_cost = AdditiveCost.of_ops(space, lambda op: op_ms(op, table), fixed=fixed_ms)
        return cls(additive_cost, UNITS["ms"], f"latency_ms on {table.title}", table)

    @classmethod
    def of_macs(cls, space: SearchSpace) -> CostModel:
        """Multiply-accumulates for one image."""
        return cls._counted(space, "macs", "macs", lambda op: op.macs)

    @classmethod
    def of_params(cls, space: SearchSpace) -> CostModel:
        """Trainable parameters."""
        return cls._counted(space, "params", "params", lambda op: op.params)

    @classmethod
    def of_bytes(cls, space: SearchSpace, dtype: Dtype = "fp32") -> CostModel:
        """Bytes of the weights; see ``weight_bytes``."""
        return cls._counted(
            space, "size_bytes", f"size_bytes in {dtype}", lambda op: weight_bytes(op.params, dtype)
        )

    @classmethod
    def _counted(
        cls, space: SearchSpace, unit: UnitName, title: str, count: Callable[[Op], float]
    ) -> CostModel:
        return cls(AdditiveCost.of_ops(space, count), UNITS[unit], title)

    @property
    def space(self) -> SearchSpace:
        """The space whose architectures have these costs."""
        return self.additive_cost.space

    @property
    def verb(self) -> str:
        """The verb for sentences: architectures "take" milliseconds but "have" MACs."""
        return "have" if self.table is None else "take"

    @property
    def source(self) -> str:
        """Suffix that names the source of a cost: `` on`` and the table's title, or
        nothing for counted costs.
        """
        return "" if self.table is None else f" on {self.table.title}"

    def cost(self, picks: Mapping[str, Option]) -> float:
        """The cost of ``picks``. Raises SpaceError if they do not belong to
        the space.
        """
        return self.additive_cost.cost(picks)

    def costs(self, index_NC: np.ndarray) -> np.ndarray:
        """The costs of many architectures at once.

        ``index_NC`` holds option positions, int [N, choices]; returns float64 [N].
        """
        return self.additive_cost.costs(index_NC)

    def expected(self, gates: Mapping[str, Any], xp: Any = np) -> Any:
        """Expected cost under independent choices, exact and differentiable.

        ``gates`` maps each choice key to a probability vector [options] of the array
        library ``xp`` (numpy or torch).
        """
        return self.additive_cost.expected(gates, xp)

    def marginals(self, gates: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """d E[cost] / d gate, in numpy: choice key -> float64 [options].

        This is what each option adds to the expected cost while the other choices
        follow ``gates``. Among all small changes of a policy p that lower its expected
        cost by the same amount, p * exp(-s * marginal), normalised, has the smallest
        Kullback-Leibler divergence from p.
        """
        return self.additive_cost.marginals(gates)

    def range(self) -> tuple[float, float]:
        """The exact costs of the cheapest and of the most expensive architecture."""
        return self.additive_cost.bounds()

    def check_target(self, target: float, key: str = "search.target_ms") -> None:
        """Raise TargetError, with the reachable range, if no architecture can meet
        ``target``. ``key`` is the configuration key that sets it.
        """
        low, high = self.range()
        if not low <= target <= high:
            unit = self.unit
            raise TargetError(
                f"target {target / unit.scale:g} {unit.symbol} is out of reach of space"
                f" {self.space.name}{self.source}: its architectures {self.verb}"
                f" {unit.shown(low, high)}; choose {key} in that range."
            )


def weight_bytes(params: int, dtype: Dtype = "fp32") -> int:
    """Size of the weights in bytes: parameters x bytes per number.

    BN scales and shifts are counted as in ``Op.params``. This is the part that can be
    compared between architectures, not the length of the exported file, which differs
    by its folded BN, the 32-bit biases of int8 networks, the quantisation scales and
    the graph itself.
    """
    return params * BYTES[dtype]


def _positional_ms(term: Term, table: LatencyTable, space: SearchSpace) -> np.ndarray:
    """Milliseconds of each option of a term, from a positional model.

    Such a model has a coefficient for every slot that varied in its space. Fixed slots
    are part of its intercept, so they cost nothing here.
    """
    option_ms = table.slots.get(term.slot, {})
    if not option_ms and not term.keys:
        return np.zeros(())
    missing = tuple(f"{term.slot}:{option}" for option in term.options if option not in option_ms)
    # A term that depends on other choices, such as a width, is more than its slot's
    # option, which is all that the model knows.
    missing += tuple(key for key in term.keys if key != term.slot)
    if missing:
        raise CoverageError(
            f"table {table.title} lacks slot costs of space {space.name}: {', '.join(missing)}.",
            missing,
        )
    slope = 1.0 if table.calibration is None else table.calibration.slope
    return slope * np.array([option_ms[option] for option in term.options]).reshape(term.shape)
