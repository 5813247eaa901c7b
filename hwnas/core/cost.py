"""What architectures cost: milliseconds by a latency table, multiply-accumulates,
parameters, or bytes of their weights.

    cost(picks) = fixed + sum over ops of their prices

By a table, the fixed part is the calibration's intercept and the prices are its
calibrated entries; what is counted has no fixed part. How a space is priced, exactly
and in expectation, is in ``additive_cost``.
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


@dataclass(frozen=True)
class Unit:
    """What a cost is counted in, and how it is shown: divided by ``scale``, with
    ``symbol`` behind it.

    ``quantity`` names the cost among limits and in what a search logs, ``noun`` in sentences.
    """

    name: UnitName
    quantity: str
    symbol: str
    noun: str
    scale: float = 1.0

    @property
    def expected(self) -> str:
        """The name of an expectation in what a search logs."""
        return f"expected_{self.name}"

    @property
    def axis(self) -> str:
        """What an axis of a figure says: ``latency, ms``, and ``M MACs``, which need no noun."""
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
    """Raise CoverageError, naming the ops, where ``table`` lacks any that ``of`` needs.
    Nothing is ever guessed.
    """
    missing = missing_ops(ops, table)
    if missing:
        shown = ", ".join(missing[:5]) + (
            f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        )
        raise CoverageError(
            f"table {table.title} (made for {table.header.space}) lacks {len(missing)} of the"
            f" {len(ops)} ops of {of}: {shown}. Profile this space on the device.",
            missing,
        )


def latency_ms(arch: Architecture, table: LatencyTable) -> float:
    """Predicted latency of a finished network: the calibrated sum over its ops, in milliseconds."""
    check_coverage(arch.ops(), table, f"architecture {arch.name!r}")
    intercept = table.calibration.intercept_ms if table.calibration is not None else 0.0
    return intercept + sum(op_ms(op, table) for op in arch.ops())


def op_ms(op: Op, table: LatencyTable) -> float:
    """What an op costs inside a network, in milliseconds."""
    entry_ms = table.entries[op.key].ms
    return entry_ms if table.calibration is None else table.calibration.op_ms(entry_ms, op)


@dataclass(frozen=True)
class CostModel:
    """A space priced in a unit; made by ``of_table``, ``of_macs``, ``of_params`` or ``of_bytes``.

    ``title`` says what the cost is and of what, as in ``latency_ms on
    board/litert-int8-1t``. ``table`` is the one that the prices are of; none where they
    are counted.

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
        """Milliseconds. Raises CoverageError or TableError where the table cannot price
        every architecture.
        """
        if table.calibration is None and not allow_uncalibrated:
            raise TableError(UNCALIBRATED.format(title=table.title))
        if not table.slots:
            check_coverage(space.ops, table, f"space {space.name}")
        foreign = sorted(table.slots.keys() - {term.slot for term in space.terms()})
        if foreign:
            raise TableError(
                f"table {table.title} prices slots of another space ({', '.join(foreign[:5])}):"
                f" space {space.name} has none such."
            )
        fixed_ms = table.calibration.intercept_ms if table.calibration is not None else 0.0
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
        cls, space: SearchSpace, unit: UnitName, title: str, price: Callable[[Op], float]
    ) -> CostModel:
        return cls(AdditiveCost.of_ops(space, price), UNITS[unit], title)

    @property
    def space(self) -> SearchSpace:
        """The space that is priced."""
        return self.additive_cost.space

    @property
    def verb(self) -> str:
        """What architectures do with a cost, in words: they take milliseconds, and have
        what is counted.
        """
        return "have" if self.table is None else "take"

    @property
    def source(self) -> str:
        """Where the prices are from, to be put behind a cost: `` on`` a table's title;
        nothing of what is counted.
        """
        return "" if self.table is None else f" on {self.table.title}"

    def cost(self, picks: Mapping[str, Option]) -> float:
        """The cost of picks. Raises SpaceError where they are none of the space."""
        return self.additive_cost.cost(picks)

    def costs(self, index_NC: np.ndarray) -> np.ndarray:
        """The costs of many picks at once: option positions int [N, choices] -> float64 [N]."""
        return self.additive_cost.costs(index_NC)

    def expected(self, gates: Mapping[str, Any], xp: Any = np) -> Any:
        """Expected cost under independent choices, exact and differentiable.

        ``gates`` maps each choice key to a probability vector [options] of the array
        library ``xp`` (numpy or torch).
        """
        return self.additive_cost.expected(gates, xp)

    def marginals(self, gates: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """d E[cost] / d gate, in numpy: choice key -> float64 [options].

        What each option adds to the expected cost while the other choices stay as in
        ``gates``. Of all changes of a policy p that lower its expected cost by a
        little, p * exp(-s * marginal), normalised, is the smallest in Kullback-Leibler
        divergence.
        """
        return self.additive_cost.marginals(gates)

    def range(self) -> tuple[float, float]:
        """The cost of the cheapest and of the dearest architecture, exact."""
        return self.additive_cost.range()

    def check_target(self, target: float, key: str = "search.target_ms") -> None:
        """Raise TargetError, printing the reachable range, where no architecture can
        meet ``target``, which ``key`` sets.
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
    """Size of the weights: parameters x bytes per number.

    BN scales and shifts are counted as ``Op.params`` counts them. An exported file
    differs by its folded BN, 32-bit biases where the weights are int8, quantisation
    scales and the graph itself: this is the comparable part, not the file's length.
    """
    return params * BYTES[dtype]


def _positional_ms(term: Term, table: LatencyTable, space: SearchSpace) -> np.ndarray:
    """Milliseconds of a term by a positional model: it prices every slot that varied in
    its space, the rest is in its intercept.
    """
    option_ms = table.slots.get(term.slot, {})
    if not option_ms and not term.keys:
        return np.zeros(())
    missing = tuple(f"{term.slot}:{option}" for option in term.options if option not in option_ms)
    missing += tuple(key for key in term.keys if key != term.slot)
    if missing:
        raise CoverageError(
            f"table {table.title} lacks slot prices of space {space.name}: {', '.join(missing)}.",
            missing,
        )
    slope = 1.0 if table.calibration is None else table.calibration.slope
    return slope * np.array([option_ms[option] for option in term.options]).reshape(term.shape)
