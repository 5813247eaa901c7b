"""Latency: a table applied to a space or to a finished network.

    latency(picks) = intercept + sum over ops of their calibrated entries

How a space is priced, exactly and in expectation, is in ``priced``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hwnas.core.arch import Architecture
from hwnas.core.ops import Op
from hwnas.core.priced import PricedSpace
from hwnas.core.space import Option, SearchSpace, Term
from hwnas.core.table import LatencyTable
from hwnas.errors import CoverageError, TableError, TargetError

UNCALIBRATED = (
    "table {title} has no calibration against whole networks, so its sums are off by an unknown factor: "
    "profile with profile.fit_networks >= 3, or set search.allow_uncalibrated = true."
)


def missing_ops(ops: Sequence[Op], table: LatencyTable) -> tuple[str, ...]:
    """Keys of the ops that ``table`` has no entry for, in order."""
    return tuple(op.key for op in ops if op.key not in table.entries)


def check_coverage(ops: Sequence[Op], table: LatencyTable, of: str) -> None:
    """Raise CoverageError, naming the ops, where ``table`` lacks any that ``of`` needs. Nothing is ever guessed."""
    missing = missing_ops(ops, table)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CoverageError(
            f"table {table.title} (made for {table.header.space}) lacks {len(missing)} of the {len(ops)} ops of {of}: {shown}. "
            "Profile this space on the device.",
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


class CostModel:
    """A space priced by a table. Raises CoverageError or TableError where the table cannot price every architecture.

    Example:
        >>> cost = CostModel(space, table)                      # doctest: +SKIP
        >>> cost.latency_ms(space.sample(rng))                  # doctest: +SKIP
        31.2
    """

    def __init__(self, space: SearchSpace, table: LatencyTable, *, allow_uncalibrated: bool = False) -> None:
        if table.calibration is None and not allow_uncalibrated:
            raise TableError(UNCALIBRATED.format(title=table.title))
        if not table.slots:
            check_coverage(space.ops, table, f"space {space.name}")
        foreign = sorted(table.slots.keys() - {term.slot for term in space.terms()})
        if foreign:
            raise TableError(
                f"table {table.title} prices slots of another space ({', '.join(foreign[:5])}): space {space.name} has none such."
            )
        self.space = space
        self.table = table
        fixed_ms = table.calibration.intercept_ms if table.calibration is not None else 0.0
        if table.slots:
            self.priced = PricedSpace(space, self._positional, fixed=fixed_ms)
        else:
            self.priced = PricedSpace.of_ops(space, lambda op: op_ms(op, table), fixed=fixed_ms)

    def _positional(self, term: Term) -> np.ndarray:
        """Milliseconds of a term by a positional model: it prices every slot that varied in its space, the rest is in its intercept."""
        priced = self.table.slots.get(term.slot, {})
        if not priced and not term.keys:
            return np.zeros(())
        missing = tuple(f"{term.slot}:{option}" for option in term.options if option not in priced)
        missing += tuple(key for key in term.keys if key != term.slot)
        if missing:
            raise CoverageError(f"table {self.table.title} lacks slot prices of space {self.space.name}: {', '.join(missing)}.", missing)
        slope = 1.0 if self.table.calibration is None else self.table.calibration.slope
        return slope * np.array([priced[option] for option in term.options]).reshape(term.shape)

    def latency_ms(self, picks: Mapping[str, Option]) -> float:
        """Predicted latency of picks, in milliseconds."""
        return self.priced.of(picks)

    def latencies_ms(self, index_NC: np.ndarray) -> np.ndarray:
        """Predicted latency of many picks at once: option positions int [N, choices] -> milliseconds float64 [N]."""
        return self.priced.of_many(index_NC)

    def expected_ms(self, gates: Mapping[str, Any], xp: Any = np) -> Any:
        """Expected latency under independent choices, exact and differentiable.

        ``gates`` maps each choice key to a probability vector [options] of the array library ``xp`` (numpy or torch).
        """
        return self.priced.expected(gates, xp)

    def marginal_ms(self, gates: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """d E[latency] / d gate, in numpy: choice key -> milliseconds float64 [options].

        What each option adds to the expected latency while the other choices stay as in ``gates``. Of all changes of a policy p that
        lower its expected latency by a little, p * exp(-s * marginal), normalised, is the smallest in Kullback-Leibler divergence.
        """
        return self.priced.marginals(gates)

    def range_ms(self) -> tuple[float, float]:
        """Latency of the fastest and of the slowest architecture, exact."""
        return self.priced.range()

    def check_target(self, target_ms: float) -> None:
        """Raise TargetError, printing the reachable range, where no architecture can meet ``target_ms``."""
        low, high = self.range_ms()
        if not low <= target_ms <= high:
            raise TargetError(
                f"target {target_ms:g} ms is out of reach of space {self.space.name} on {self.table.title}: "
                f"its architectures take {low:.4g} to {high:.4g} ms; choose search.target_ms in that range."
            )
