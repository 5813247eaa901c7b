"""Prices: a latency table applied to a space, compiled to small arrays.

    latency(picks)  = intercept + sum over terms of price[op of the term under the picks]
    E[latency](p)   = intercept + sum over terms of <prices of the term, outer product of p over the term's choices>

where the price of an op is its calibrated entry.
The expectation is exact for independent choices, coupled widths included, because each term is contracted with all the
choices it depends on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import Any

import numpy as np

from hwnas.core.arch import Architecture
from hwnas.core.op import Op
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
    return entry_ms if table.calibration is None else table.calibration.op_ms(entry_ms, op.params)


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
        position = {choice.key: i for i, choice in enumerate(space.choices)}
        self._fixed_ms = table.calibration.intercept_ms if table.calibration is not None else 0.0
        self._arrays: list[tuple[tuple[int, ...], np.ndarray]] = []
        for term in space.terms():
            array = self._priced(term)
            if term.keys:
                self._arrays.append((tuple(position[key] for key in term.keys), array))
            else:
                self._fixed_ms += float(array)
        self._converted: dict[Any, list[Any]] = {}

    def _priced(self, term: Term) -> np.ndarray:
        """Milliseconds of a term for each combination of its options."""
        if self.table.slots:
            return self._positional(term)
        ms = [0.0 if op is None else op_ms(op, self.table) for op in term.ops]
        return np.array(ms).reshape(term.shape)

    def _positional(self, term: Term) -> np.ndarray:
        """The same by a positional model: it prices every slot that varied in its space, the rest is in its intercept."""
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
        return float(self.latencies_ms(self.space.index(picks)[None])[0])

    def latencies_ms(self, index_NC: np.ndarray) -> np.ndarray:
        """Predicted latencies of many picks at once: option positions int [N, choices] -> milliseconds float64 [N]."""
        total = np.full(len(index_NC), self._fixed_ms)
        for positions, array in self._arrays:
            total += array[tuple(index_NC[:, i] for i in positions)]
        return total

    def expected_ms(self, gates: Mapping[str, Any], xp: Any = np) -> Any:
        """Expected latency under independent choices, exact and differentiable.

        ``gates`` maps each choice key to a probability vector [options] of the array library ``xp`` (numpy or torch).
        """
        example: Any = next(iter(gates.values()), None)
        kind = (xp, getattr(example, "dtype", None), getattr(example, "device", None))
        if kind not in self._converted:
            where = {"device": example.device} if hasattr(example, "new_tensor") else {}  # torch: where the gates are
            self._converted[kind] = [xp.asarray(array, dtype=kind[1], **where) for _, array in self._arrays]
        keys = [choice.key for choice in self.space.choices]
        total: Any = self._fixed_ms
        for (positions, _), array in zip(self._arrays, self._converted[kind], strict=True):
            letters = ascii_lowercase[: len(positions)]
            total = total + xp.einsum(f"{letters},{','.join(letters)}->", array, *(gates[keys[i]] for i in positions))
        return total

    def range_ms(self) -> tuple[float, float]:
        """Latency of the fastest and of the slowest architecture, exact, by eliminating one choice after another."""
        return self._extreme(np.min), self._extreme(np.max)

    def _extreme(self, reduce: Any) -> float:
        factors = [(positions, array) for positions, array in self._arrays]
        constant = self._fixed_ms
        for choice in range(len(self.space.choices)):
            touched = [factor for factor in factors if choice in factor[0]]
            factors = [factor for factor in factors if choice not in factor[0]]
            axes = tuple(sorted({i for positions, _ in touched for i in positions}))
            combined: Any = np.zeros((1,) * len(axes))
            for positions, array in touched:
                ordered = np.transpose(array, np.argsort(positions))
                shape = [len(self.space.choices[i].options) if i in positions else 1 for i in axes]
                combined = combined + ordered.reshape(shape)
            combined = reduce(combined, axis=axes.index(choice)) if touched else combined
            rest = tuple(i for i in axes if i != choice)
            if rest:
                factors.append((rest, combined))
            else:
                constant += float(combined) if touched else 0.0
        return constant

    def check_target(self, target_ms: float) -> None:
        """Raise TargetError, printing the reachable range, where no architecture can meet ``target_ms``."""
        low, high = self.range_ms()
        if not low <= target_ms <= high:
            raise TargetError(
                f"target {target_ms:g} ms is out of reach of space {self.space.name} on {self.table.title}: "
                f"its architectures take {low:.4g} to {high:.4g} ms; choose search.target_ms in that range."
            )
