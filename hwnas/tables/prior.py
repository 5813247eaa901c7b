"""What is believed of a device before anything was measured on it: price lists that it
may resemble, and how far it may be from them.

A *price list* is what every op costs, and the fixed rest, in any unit: only its
proportions count. There are two kinds:

- *known devices*: the list of each table that is given;
- *the roofline*: the mean of five lists that are counted, not measured: layers, dense
  MACs, depthwise MACs, values moved and parameters. A device whose time went into one
  of them alone would have exactly that list; real ones lie between.

A device that resembles a list t, measured in units of its mean network, has the prices

    w = a t + c e + rho * sum over companions u of b_u (u - t) + tau * (t . z),        a, b_u ~ N(0, 1), c ~ N(0, INTERCEPT^2), z ~ N(0, C)

with e the intercept, and as companions all other known lists, or the roofline's five.
C[i, j] = ALIKE^(fields in which ops i and j differ): a device that is slow at one 5 x 5
block is slow at its neighbours. Each list, rho and tau is a belief of its own, and the
measurements choose among them (``regression``). No deviation of a kind has the
probability EXACT, its sizes share the rest evenly; but no device is the roofline's
mean, so that there a deviation towards the five is certain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hwnas.core.cost import check_coverage, op_ms
from hwnas.core.ops import Op
from hwnas.core.table import LatencyTable
from hwnas.errors import TableError

INTERCEPT = 0.1
"""Standard deviation of the fixed part of a network's latency beyond the list's own, in
mean networks.
"""
ALIKE = 0.9
"""Correlation of the deviations of two ops that differ in one field."""
EXACT = 0.75
RHO = (0.05, 0.2)
"""Sizes of deviations towards a companion."""
TAU = (0.03, 0.1, 0.3, 1.0)
"""Sizes of deviations of single ops, relative to their price."""
ROOFLINE = "roofline"


@dataclass(frozen=True)
class Belief:
    """A centre list and the ways from it to its companions, in units of the mean
    network: float [ops + 1], the intercept last.

    ``exact`` is the probability that there is no deviation towards a companion.
    """

    name: str
    centre_P: np.ndarray
    away_KP: np.ndarray
    exact: float

    @property
    def sizes(self) -> Iterator[tuple[float, float, float]]:
        """Every (rho, tau, log probability)."""
        along = _sizes(RHO, self.exact) if len(self.away_KP) else [(0.0, 1.0)]
        return ((rho, tau, math.log(p * q)) for rho, p in along for tau, q in _sizes(TAU, EXACT))


def _sizes(sizes: Sequence[float], exact: float) -> list[tuple[float, float]]:
    """Sizes with their probabilities, those of none left out."""
    found = [(0.0, exact), *((size, (1 - exact) / len(sizes)) for size in sizes)]
    return [(size, probability) for size, probability in found if probability]


@dataclass(frozen=True)
class Prior:
    """Price lists over ``ops``: ``known`` float [devices, ops + 1] under ``names``, the
    intercept last.

    Example:
        >>> from hwnas.core.spaces import mobile32
        >>> Prior.of(mobile32().ops).names
        ()
    """

    ops: tuple[Op, ...]
    names: tuple[str, ...]
    known_KP: np.ndarray

    @classmethod
    def of(cls, ops: Sequence[Op], tables: Sequence[LatencyTable] = ()) -> Prior:
        """The prior of known devices' tables; of the roofline alone without any.

        Raises CoverageError where a table lacks ops, TableError where it prices
        positions instead of ops.
        """
        known = np.zeros((len(tables), len(ops) + 1))
        for i, table in enumerate(tables):
            if not table.entries:
                raise TableError(
                    f"table {table.title} prices positions of a space, not ops: give a table of ops"
                    " as the prior."
                )
            check_coverage(ops, table, "the fit")
            known[i] = [
                *(op_ms(op, table) for op in ops),
                table.calibration.intercept_ms if table.calibration is not None else 0.0,
            ]
        return cls(tuple(ops), tuple(table.title for table in tables), known)

    @cached_property
    def counted(self) -> np.ndarray:
        """The roofline's five lists: float [5, ops + 1]."""
        return np.array([[*column, 0.0] for column in zip(*map(_counts, self.ops), strict=True)])

    @cached_property
    def _fields(self) -> np.ndarray:
        """What may differ between ops, as integers [fields, ops]."""
        rows = [_traits(op) for op in self.ops]
        return np.array(
            [
                np.unique(np.array(column), return_inverse=True)[1]
                for column in zip(*rows, strict=True)
            ]
        )

    def alike(self, of: np.ndarray, to: np.ndarray) -> np.ndarray:
        """Correlations of the deviations of ops: index arrays [A] and [B] -> float [A, B]."""
        differing = np.zeros((len(of), len(to)), dtype=np.int64)
        for field in self._fields:
            differing += field[of, None] != field[to]
        correlations: np.ndarray = ALIKE**differing
        return correlations

    def beliefs(self, mean_P: np.ndarray) -> list[Belief]:
        """All beliefs, for networks whose mean holds each op ``mean_P`` times: float
        [ops + 1], the intercept once.

        Raises TableError where a table prices that mean at 0 or below.
        """
        unit_ms = self.known_KP @ mean_P
        if (unit_ms <= 0).any():
            raise TableError(
                f"table {self.names[int(unit_ms.argmin())]} prices the measured networks at 0 ms:"
                " it cannot be a prior of them."
            )
        known = self.known_KP / unit_ms[:, None]
        counted = self.counted[self.counted @ mean_P > 0]
        counted = counted / (counted @ mean_P)[:, None]
        found = [
            Belief(name, known[i], np.delete(known, i, axis=0) - known[i], EXACT)
            for i, name in enumerate(self.names)
        ]
        centre = counted.mean(axis=0)
        return [*found, Belief(ROOFLINE, centre, counted - centre, exact=0.0)]


def _traits(op: Op) -> tuple[Any, ...]:
    """What may differ between two ops; an expansion is relative to the input's width."""
    shape = (
        op.kind,
        op.size,
        op.in_ch,
        op.out_ch,
        op.mid_ch / op.in_ch,
        op.kernel,
        op.stride,
        op.groups,
    )
    return *shape, op.se_ch > 0, op.act, op.residual, getattr(op, "se_gate", "sigmoid")


def _counts(op: Op) -> tuple[float, ...]:
    """Layers, dense MACs, depthwise MACs, values read and written, parameters."""
    depthwise = sum(layer.macs for layer in op.layers if layer.groups == layer.in_ch > 1)
    moved = sum(
        layer.in_ch * layer.size**2 + layer.out_ch * layer.out_size**2 for layer in op.layers
    )
    moved += op.in_ch * op.size**2 if op.pooled or op.residual else 0
    return len(op.layers), op.macs - depthwise, depthwise, moved, op.params
